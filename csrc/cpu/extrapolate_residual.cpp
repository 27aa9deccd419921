// SPDX-License-Identifier: Apache-2.0
// extrapolate_residual on the CPU.
#include "ops.h"
#include "parallel.h"

namespace adacache::cpu {

void extrapolate_residual(const ExtrapolateResidual& p) {
  const TokenShape shape{p.rows, 1, p.tokens, p.channels};
  const Kernels& chosen = kernels();
  const Streaming streaming{.out = worth_streaming(p.out, p.x, p.out_strides, shape, p.dtype)};
  for_each_token_unit(shape, p.dtype, streaming, [&](const TokenUnit& unit) {
    const int64_t video = p.video_of_row ? p.video_of_row[unit.row] : p.videos == 1 ? 0 : unit.row;
    chosen.extrapolate_residual(p, p.coefficients + video * p.factors, unit);
  });
}

}  // namespace adacache::cpu

// SPDX-License-Identifier: Apache-2.0
// reuse_residual on the CPU.
#include "ops.h"
#include "parallel.h"

namespace adacache::cpu {

void reuse_residual(const ReuseResidual& p) {
  const TokenShape shape{p.rows, 1, p.tokens, p.channels};
  const Kernels& chosen = kernels();
  const Streaming streaming{.out = worth_streaming(p.out, p.x, p.out_strides, shape, p.dtype)};
  for_each_token_unit(shape, p.dtype, streaming, [&](const TokenUnit& unit) {
    const int64_t video = p.video_of_row ? p.video_of_row[unit.row] : p.videos == 1 ? 0 : unit.row;
    const bool reuse = p.reuse == nullptr || p.reuse[video];
    if (reuse || p.out != p.x) chosen.reuse_residual(p, reuse, unit);
  });
}

}  // namespace adacache::cpu

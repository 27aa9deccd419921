// SPDX-License-Identifier: Apache-2.0
// gated_residual on the CPU.
#include "ops.h"
#include "parallel.h"

namespace adacache::cpu {

void gated_residual(const GatedResidual& p) {
  const TokenShape& s = p.shape;
  const Kernels& chosen = kernels();
  const Streaming streaming{.out = worth_streaming(p.out, p.x, p.out_strides, s, p.dtype)};
  for_each_token_unit(s, p.dtype, streaming,
                      [&](const TokenUnit& unit) { chosen.gated_residual(p, nullptr, unit); });
}

}  // namespace adacache::cpu

// SPDX-License-Identifier: Apache-2.0
// gated_residual_norm on the CPU.
#include "ops.h"
#include "parallel.h"

namespace adacache::cpu {

void gated_residual_norm(const GatedResidualNorm& parameters) {
  const GatedResidual& p = parameters.residual;
  const Norm& norm = parameters.norm;
  const Kernels& chosen = kernels();
  const Streaming streaming{.out = worth_streaming(p.out, p.x, p.out_strides, p.shape, p.dtype),
                            .norm = worth_streaming(norm, p.x, p.shape, p.dtype)};
  for_each_token_unit(p.shape, p.dtype, streaming,
                      [&](const TokenUnit& unit) { chosen.gated_residual(p, &norm, unit); });
}

}  // namespace adacache::cpu

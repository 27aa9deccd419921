// SPDX-License-Identifier: Apache-2.0
// gated_residual_norm_meter on the CPU.
#include "ops.h"
#include "parallel.h"

namespace adacache::cpu {

void gated_residual_norm_meter(const GatedResidualNormMeter& parameters, const MeterSums& sums) {
  const GatedResidualMeter& p = parameters.meter;
  const Norm& norm = parameters.norm;
  const Kernels& chosen = kernels();
  const Streaming streaming{.out = worth_streaming(p.out, p.x, p.out_strides, p.shape, p.dtype),
                            .norm = worth_streaming(norm, p.x, p.shape, p.dtype)};
  meter(p, streaming, sums, [&](const MeterUnit& unit) { chosen.gated_residual_meter(p, &norm, unit); });
}

}  // namespace adacache::cpu

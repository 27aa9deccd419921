// SPDX-License-Identifier: Apache-2.0
// extrapolate_residual_meter on the CPU.
#include "ops.h"
#include "parallel.h"

namespace adacache::cpu {

void extrapolate_residual_meter(const ExtrapolateResidualMeter& p, const MeterSums& sums) {
  const Kernels& chosen = kernels();
  const ExtrapolateResidual& f = p.forecast;
  const Streaming streaming{.out = worth_streaming(f.out, f.x, f.out_strides, p.shape, p.dtype)};
  meter(p, streaming, sums, [&](const MeterUnit& unit) { chosen.extrapolate_residual_meter(p, unit); });
}

}  // namespace adacache::cpu

// SPDX-License-Identifier: Apache-2.0
// gated_residual_meter on the CPU.
#include "ops.h"
#include "parallel.h"

namespace adacache::cpu {

void gated_residual_meter(const GatedResidualMeter& p, const MeterSums& sums) {
  const Kernels& chosen = kernels();
  const Streaming streaming{.out = worth_streaming(p.out, p.x, p.out_strides, p.shape, p.dtype)};
  meter(p, streaming, sums, [&](const MeterUnit& unit) { chosen.gated_residual_meter(p, nullptr, unit); });
}

}  // namespace adacache::cpu

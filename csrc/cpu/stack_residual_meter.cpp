// SPDX-License-Identifier: Apache-2.0
// stack_residual_meter on the CPU.
#include "ops.h"
#include "parallel.h"

namespace adacache::cpu {

void stack_residual_meter(const StackResidualMeter& p, const MeterSums& sums) {
  const Kernels& chosen = kernels();
  const Streaming streaming{.out = p.out && worth_streaming(p.out, p.x_in, p.out_strides, p.shape, p.dtype)};
  meter(p, streaming, sums, [&](const MeterUnit& unit) { chosen.stack_residual_meter(p, unit); });
}

}  // namespace adacache::cpu

// SPDX-License-Identifier: Apache-2.0
// residual_meter on the CPU.
#include "ops.h"
#include "parallel.h"

namespace adacache::cpu {

void residual_meter(const ResidualMeter& p, const MeterSums& sums) {
  const Kernels& chosen = kernels();
  meter(p, {}, sums, [&](const MeterUnit& unit) { chosen.residual_meter(p, unit); });
}

}  // namespace adacache::cpu

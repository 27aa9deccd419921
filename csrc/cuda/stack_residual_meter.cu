// SPDX-License-Identifier: Apache-2.0
// stack_residual_meter on CUDA.
#include "bodies/stack_residual_meter.h"
#include "meter_op.cuh"

namespace adacache::cuda {

int64_t workspace_elements(const StackResidualMeter& p) { return workspace_of(p); }

cudaError_t stack_residual_meter(const StackResidualMeter& p, const MeterSums& sums, cudaStream_t stream) {
  return launch_meter</*keeps=*/true>(p, sums, stream);
}

}  // namespace adacache::cuda

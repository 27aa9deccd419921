// SPDX-License-Identifier: Apache-2.0
// gated_residual_meter on CUDA.
#include "bodies/gated_residual_meter.h"
#include "meter_op.cuh"

namespace adacache::cuda {

int64_t workspace_elements(const GatedResidualMeter& p) { return workspace_of(p); }

cudaError_t gated_residual_meter(const GatedResidualMeter& p, const MeterSums& sums, cudaStream_t stream) {
  return launch_meter</*keeps=*/true>(p, sums, stream);
}

}  // namespace adacache::cuda

// SPDX-License-Identifier: Apache-2.0
// residual_meter on CUDA.
#include "bodies/residual_meter.h"
#include "meter_op.cuh"

namespace adacache::cuda {

int64_t workspace_elements(const ResidualMeter& p) { return workspace_of(p); }

cudaError_t residual_meter(const ResidualMeter& p, const MeterSums& sums, cudaStream_t stream) {
  return launch_meter</*keeps=*/false>(p, sums, stream);
}

}  // namespace adacache::cuda

// The ops on a CUDA device, on checked raw pointers. Each returns the first error of its launches.
#pragma once

#include <cuda_runtime_api.h>

#include "../core/decide.h"
#include "../core/gated_residual_meter.h"
#include "../core/residual_meter.h"
#include "../core/reuse_residual.h"

namespace adacache::cuda {

// The shape of a meter's launch, and the workspace that it needs: one float64 per row, column and block.
struct MeterLaunch {
  int width;
  int64_t blocks_per_row;
  int64_t blocks;
  int64_t workspace_elements;
};

MeterLaunch plan(const GatedResidualMeter& parameters);
MeterLaunch plan(const ResidualMeter& parameters);

// sums: [num_videos, sum_columns] float64, written as a whole.
cudaError_t gated_residual_meter(const GatedResidualMeter& parameters, const MeterLaunch& launch,
                                 double* workspace, const int32_t* video_of_row, int64_t num_videos,
                                 double* sums, cudaStream_t stream);
cudaError_t residual_meter(const ResidualMeter& parameters, const MeterLaunch& launch, double* workspace,
                           const int32_t* video_of_row, int64_t num_videos, double* sums,
                           cudaStream_t stream);
cudaError_t reuse_residual(const ReuseResidual& parameters, cudaStream_t stream);
cudaError_t decide(const DecisionRule& rule, const double* sums, int64_t sums_columns, double* state,
                   int64_t state_columns, int64_t videos, int64_t step, int64_t site, cudaStream_t stream);

}  // namespace adacache::cuda

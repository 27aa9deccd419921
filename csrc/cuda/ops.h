// SPDX-License-Identifier: Apache-2.0
// The CUDA ops. Parameters are already checked. Each function returns the first error of its launches.
#pragma once

#include <cuda_runtime_api.h>

#include "../core/decide.h"
#include "../core/extrapolate_residual.h"
#include "../core/extrapolate_residual_meter.h"
#include "../core/gated_residual.h"
#include "../core/gated_residual_meter.h"
#include "../core/gated_residual_norm.h"
#include "../core/gated_residual_norm_meter.h"
#include "../core/layer_norm_modulate.h"
#include "../core/residual_meter.h"
#include "../core/reuse_residual.h"
#include "../core/stack_residual_meter.h"

namespace adacache::cuda {

// The outputs of a meter, its workspace, and the video of each row.
struct MeterSums {
  const int32_t* video_of_row;  // null: all rows are video 0
  int64_t num_videos;
  double* sums;       // [num_videos, sum_columns]; all of it is written
  double* workspace;  // [workspace_elements()]
};

// The float64 workspace elements of a meter.
int64_t workspace_elements(const GatedResidualMeter& parameters);
int64_t workspace_elements(const StackResidualMeter& parameters);
int64_t workspace_elements(const ResidualMeter& parameters);
int64_t workspace_elements(const GatedResidualNormMeter& parameters);
int64_t workspace_elements(const ExtrapolateResidualMeter& parameters);

cudaError_t gated_residual_meter(const GatedResidualMeter& parameters, const MeterSums& sums,
                                 cudaStream_t stream);
cudaError_t stack_residual_meter(const StackResidualMeter& parameters, const MeterSums& sums,
                                 cudaStream_t stream);
cudaError_t residual_meter(const ResidualMeter& parameters, const MeterSums& sums, cudaStream_t stream);
cudaError_t extrapolate_residual_meter(const ExtrapolateResidualMeter& parameters, const MeterSums& sums,
                                       cudaStream_t stream);
cudaError_t gated_residual_norm_meter(const GatedResidualNormMeter& parameters, const MeterSums& sums,
                                      cudaStream_t stream);

cudaError_t gated_residual(const GatedResidual& parameters, cudaStream_t stream);
cudaError_t reuse_residual(const ReuseResidual& parameters, cudaStream_t stream);
cudaError_t extrapolate_residual(const ExtrapolateResidual& parameters, cudaStream_t stream);
cudaError_t layer_norm_modulate(const LayerNormModulate& parameters, cudaStream_t stream);
cudaError_t norm_modulate_float8(const LayerNormModulate& parameters, cudaStream_t stream);
cudaError_t gated_residual_norm(const GatedResidualNorm& parameters, cudaStream_t stream);
cudaError_t gated_residual_norm_float8(const GatedResidualNorm& parameters, cudaStream_t stream);
cudaError_t decide(const DecisionRule& rule, const Schedules& schedules, const double* sums,
                   int64_t sums_columns, double* state, int64_t state_columns, int64_t videos, int64_t site,
                   cudaStream_t stream);

}  // namespace adacache::cuda

// SPDX-License-Identifier: Apache-2.0
// The CPU ops. Parameters are already checked.
#pragma once

#include "../core/extrapolate_residual.h"
#include "../core/extrapolate_residual_meter.h"
#include "../core/fused_qk_norm_rope.h"
#include "../core/gated_residual.h"
#include "../core/gated_residual_meter.h"
#include "../core/gated_residual_norm.h"
#include "../core/gated_residual_norm_meter.h"
#include "../core/layer_norm_modulate.h"
#include "../core/residual_meter.h"
#include "../core/reuse_residual.h"
#include "../core/stack_residual_meter.h"
#include "../core/temporal_attention.h"

namespace adacache::cpu {

// The output of a meter. All of `sums` is written.
struct MeterSums {
  const int32_t* video_of_row;  // null: all rows are video 0
  int64_t num_videos;
  double* sums;  // [num_videos, sum_columns]
};

void gated_residual(const GatedResidual& parameters);
void gated_residual_meter(const GatedResidualMeter& parameters, const MeterSums& sums);
void stack_residual_meter(const StackResidualMeter& parameters, const MeterSums& sums);
void residual_meter(const ResidualMeter& parameters, const MeterSums& sums);
void reuse_residual(const ReuseResidual& parameters);
void extrapolate_residual(const ExtrapolateResidual& parameters);
void extrapolate_residual_meter(const ExtrapolateResidualMeter& parameters, const MeterSums& sums);
void layer_norm_modulate(const LayerNormModulate& parameters);
void gated_residual_norm(const GatedResidualNorm& parameters);
void gated_residual_norm_meter(const GatedResidualNormMeter& parameters, const MeterSums& sums);
void fused_qk_norm_rope(const FusedQkNormRope& parameters);
void temporal_attention(const TemporalAttention& parameters);

// Requests huge pages for newly allocated memory: page faults on small pages take longer than the op.
void prepare_fresh_memory(void* data, int64_t bytes);

}  // namespace adacache::cpu

// The ops on the CPU, on checked raw pointers.
#pragma once

#include "../core/decide.h"
#include "../core/gated_residual_meter.h"
#include "../core/residual_meter.h"
#include "../core/reuse_residual.h"

namespace adacache::cpu {

// sums: [num_videos, sum_columns], written as a whole. video_of_row: checked, or null for one video.
void gated_residual_meter(const GatedResidualMeter& parameters, const int32_t* video_of_row,
                          int64_t num_videos, double* sums);
void residual_meter(const ResidualMeter& parameters, const int32_t* video_of_row, int64_t num_videos,
                    double* sums);
void reuse_residual(const ReuseResidual& parameters);

// Asks for huge pages for memory that has not been touched yet: first touches of small ones cost more than
// the op.
void prepare_fresh_memory(void* data, int64_t bytes);

}  // namespace adacache::cpu

// SPDX-License-Identifier: Apache-2.0
// Shared by the meter launches.
#pragma once

#include "token.cuh"

namespace adacache::cuda {

// Minimum blocks per multiprocessor of meter_walk: 4 blocks hide memory latency with 64 registers per thread.
// All columns, Blackwell, and General elements need more registers: lower occupancy costs less than spills.
constexpr int walk_blocks(bool all_columns, bool general) {
  if (general) return 2;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  return all_columns ? 2 : 3;
#else
  return all_columns ? 3 : 4;
#endif
}

// Reduces the sums of the blocks to the sums of the videos. Defined in video_sums.cu.
cudaError_t finish_meter(const TokenShape& shape, const MotionStrides& motion, bool all_columns,
                         const Plan& plan, const MeterSums& sums, cudaStream_t stream);

}  // namespace adacache::cuda

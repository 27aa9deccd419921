// Shared by the launches of the meters.
#pragma once

#include "token.cuh"

namespace adacache::cuda {

// Blocks on a multiprocessor that the walk along frames is compiled for: enough warps to hide memory latency,
// of 64 registers a thread. All columns take a few more registers, and so does Blackwell: less occupancy
// costs less than spills.
constexpr int walk_blocks(bool all_columns) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  return all_columns ? 2 : 3;
#else
  return all_columns ? 3 : 4;
#endif
}

// The blocks' sums become the videos' sums, after the meter itself; defined in video_sums.cu.
cudaError_t finish_meter(const TokenShape& shape, const MotionStrides& motion, bool all_columns,
                         const Plan& plan, const MeterSums& sums, cudaStream_t stream);

}  // namespace adacache::cuda

// SPDX-License-Identifier: Apache-2.0
// decide on CUDA: one thread per video.
#include "block.cuh"

namespace adacache::cuda {

// One warp per block: there are few videos.
__global__ void __launch_bounds__(warp_threads) decide(const __grid_constant__ DecisionRule rule,
                                                       const __grid_constant__ Schedules schedules,
                                                       const double* sums, int64_t sums_columns,
                                                       double* state, int64_t state_columns, int64_t videos,
                                                       int64_t site) {
  const int64_t video = int64_t{blockIdx.x} * warp_threads + threadIdx.x;
  if (video < videos)
    adacache::decide(state + video * state_columns, sums + video * sums_columns, rule,
                     schedule_of(schedules, video), site);
}

cudaError_t decide(const DecisionRule& rule, const Schedules& schedules, const double* sums,
                   int64_t sums_columns, double* state, int64_t state_columns, int64_t videos, int64_t site,
                   cudaStream_t stream) {
  if (videos == 0) return cudaSuccess;
  const int64_t blocks = (videos + warp_threads - 1) / warp_threads;
  decide<<<static_cast<unsigned>(blocks), warp_threads, 0, stream>>>(rule, schedules, sums, sums_columns,
                                                                     state, state_columns, videos, site);
  return cudaGetLastError();
}

}  // namespace adacache::cuda

// CUDA's own block context for the bodies in csrc/core, and what the launches share.
#pragma once

#include "../core/block.h"
#include "ops.h"

namespace adacache::cuda {

constexpr int block_threads = 256;
// Enough warps to hide memory latency: four blocks of 256 on a multiprocessor leave each thread 64 registers.
// Measuring all columns takes a few more, which are better had from occupancy than from spilling.
constexpr int blocks_per_multiprocessor = 4;
constexpr int blocks_per_multiprocessor_all_columns = 3;

struct DeviceBlock {
  __device__ __forceinline__ int thread() const { return threadIdx.x; }
  __device__ __forceinline__ int threads() const { return block_threads; }
  __device__ __forceinline__ int64_t index() const { return blockIdx.x; }
  __device__ __forceinline__ void barrier() const { __syncthreads(); }
  __device__ __forceinline__ double shuffle_down(double value, int distance) const {
    return __shfl_down_sync(0xffffffffu, value, distance);
  }
  __device__ __forceinline__ void* shared() const {
    extern __shared__ double adacache_shared[];
    return adacache_shared;
  }
};

template <class Parameters>
MeterLaunch plan_meter(const Parameters& p) {
  MeterLaunch launch{};
  const int wide = p.dtype == DType::float32 ? vector_width<float> : vector_width<bfloat16>;
  launch.width = vectors_fit(p, wide) ? wide : 1;
  launch.blocks_per_row = p.shape.frames > 0 ? meter_blocks_per_row(p.shape, launch.width, block_threads) : 0;
  launch.blocks = p.shape.rows * launch.blocks_per_row;
  launch.workspace_elements = launch.blocks * sum_columns(p.motion);
  return launch;
}

// Blocks of all videos and columns, after the meter itself; defined in video_sums.cu.
cudaError_t launch_video_sums(const VideoSums& parameters, cudaStream_t stream);

template <class Parameters>
cudaError_t finish_meter(const Parameters& p, const MeterLaunch& launch, const double* workspace,
                         const int32_t* video_of_row, int64_t num_videos, double* sums, cudaStream_t stream) {
  return launch_video_sums({workspace, video_of_row, sums, p.shape.rows, launch.blocks_per_row, num_videos,
                            sum_columns(p.motion), p.all_columns},
                           stream);
}

}  // namespace adacache::cuda

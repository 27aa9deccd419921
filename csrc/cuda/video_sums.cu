// The last step of the meters on CUDA: the blocks' sums become the videos' sums.
#include "block.cuh"

namespace adacache::cuda {

__global__ void __launch_bounds__(block_threads) video_sums(const __grid_constant__ VideoSums p) {
  DeviceBlock block;
  video_sums_body(block, p);
}

cudaError_t launch_video_sums(const VideoSums& p, cudaStream_t stream) {
  video_sums<<<static_cast<unsigned>(p.num_videos * p.columns), block_threads,
               video_sums_shared_bytes(block_threads), stream>>>(p);
  return cudaGetLastError();
}

}  // namespace adacache::cuda

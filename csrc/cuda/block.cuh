// The block context of the device for the bodies in bodies/, and what the launches share.
#pragma once

#include "bodies/block.h"
#include "ops.h"

namespace adacache::cuda {

// Of the kernels whose block size does not follow from the channels.
constexpr int block_threads = 256;

// fixed_threads: of a block, 0 if only known at the launch.
template <int fixed_threads>
struct DeviceBlock {
  __device__ __forceinline__ int thread() const { return threadIdx.x; }
  __device__ __forceinline__ int threads() const { return fixed_threads ? fixed_threads : blockDim.x; }
  __device__ __forceinline__ int64_t index() const { return int64_t{blockIdx.y} * gridDim.x + blockIdx.x; }
  __device__ __forceinline__ void barrier() const { __syncthreads(); }
  template <class Value>
  __device__ __forceinline__ Value shuffle_down(Value value, int distance) const {
    return __shfl_down_sync(0xffffffffu, value, distance);
  }
  __device__ __forceinline__ uint32_t warp_largest(uint32_t value) const {
    return __reduce_max_sync(0xffffffffu, value);
  }
  __device__ __forceinline__ void* shared() const {
    extern __shared__ uint4 adacache_shared[];
    return adacache_shared;
  }
};

// Launches kernel(arguments...) on plan.blocks blocks, which one dimension of a grid may not hold. The
// kernels leave blocks whose index is not below plan.blocks alone.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Plan& plan, int64_t shared_bytes, cudaStream_t stream,
                   const Arguments&... arguments) {
  if (plan.blocks == 0) return cudaSuccess;
  constexpr int64_t longest = (int64_t{1} << 31) - 1;
  const int64_t rows = (plan.blocks - 1) / longest + 1;
  const dim3 grid(static_cast<unsigned>((plan.blocks - 1) / rows + 1), static_cast<unsigned>(rows));
  kernel<<<grid, static_cast<unsigned>(plan.threads), static_cast<size_t>(shared_bytes), stream>>>(
      arguments...);
  return cudaGetLastError();
}

}  // namespace adacache::cuda

// SPDX-License-Identifier: Apache-2.0
// The device implementation of Block for the kernel bodies in bodies/, and the launch function.
#pragma once

#include "bodies/block.h"
#include "ops.h"

namespace adacache::cuda {

// The block size of kernels where it does not depend on the channels.
constexpr int block_threads = 256;

// fixed_threads: threads per block; 0 if known only at launch.
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

// Calls function(Element{}) with the element type of the dtype, or General of it.
template <class Function>
void dispatch(DType dtype, bool general, const Function& function) {
  adacache::dispatch(dtype, [&](auto element) {
    if (general)
      function(General<decltype(element)>{});
    else
      function(element);
  });
}

// Launches kernel(arguments...) on at least plan.blocks blocks, in a 2-D grid because gridDim.x is limited.
// Kernels return for block indices from plan.blocks on.
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

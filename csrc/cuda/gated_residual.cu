// gated_residual on CUDA.
#include "block.cuh"
#include "bodies/gated_residual.h"

namespace adacache::cuda {

template <class T, int width>
__global__ void __launch_bounds__(block_threads) gated_residual(const __grid_constant__ GatedResidual p,
                                                                const __grid_constant__ Plan plan) {
  DeviceBlock<block_threads> block;
  if (block.index() < plan.blocks) gated_residual_body<T, width>(block, p, plan);
}

cudaError_t gated_residual(const GatedResidual& p, cudaStream_t stream) {
  const Plan plan = plan_of(p, block_threads);
  cudaError_t error = cudaSuccess;
  dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    const auto kernel = plan.width == 1 ? gated_residual<T, 1> : gated_residual<T, vector_width<T>>;
    error = launch(kernel, plan, 0, stream, p, plan);
  });
  return error;
}

}  // namespace adacache::cuda

// SPDX-License-Identifier: Apache-2.0
// gated_residual on CUDA.
#include "block.cuh"
#include "bodies/gated_residual.h"

namespace adacache::cuda {

template <class Element, int width>
__global__ void __launch_bounds__(block_threads) gated_residual(const __grid_constant__ GatedResidual p,
                                                                const __grid_constant__ Plan plan) {
  DeviceBlock<block_threads> block;
  if (block.index() < plan.blocks) gated_residual_body<Element, width>(block, p, plan);
}

cudaError_t gated_residual(const GatedResidual& p, cudaStream_t stream) {
  const Plan plan = plan_of(p, block_threads);
  cudaError_t error = cudaSuccess;
  dispatch(p.dtype, is_general(p), [&](auto element) {
    using Element = decltype(element);
    const auto kernel =
        plan.width == 1 ? gated_residual<Element, 1> : gated_residual<Element, vector_width<Element>>;
    error = launch(kernel, plan, 0, stream, p, plan);
  });
  return error;
}

}  // namespace adacache::cuda

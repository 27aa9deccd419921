// SPDX-License-Identifier: Apache-2.0
// extrapolate_residual on CUDA.
#include "block.cuh"
#include "bodies/extrapolate_residual.h"

namespace adacache::cuda {

// F is the element type of the factors.
template <class T, class F, int width>
__global__ void __launch_bounds__(block_threads) extrapolate_residual(
    const __grid_constant__ ExtrapolateResidual p, const __grid_constant__ Plan plan) {
  DeviceBlock<block_threads> block;
  if (block.index() < plan.blocks) extrapolate_residual_body<T, F, width>(block, p, plan);
}

cudaError_t extrapolate_residual(const ExtrapolateResidual& p, cudaStream_t stream) {
  const Plan plan = plan_of(p, block_threads);
  cudaError_t error = cudaSuccess;
  dispatch(p.dtype, [&](auto element) {
    dispatch(p.factor_dtype, [&](auto factor_element) {
      using T = decltype(element);
      using F = decltype(factor_element);
      const auto kernel =
          plan.width == 1 ? extrapolate_residual<T, F, 1> : extrapolate_residual<T, F, vector_width<T>>;
      error = launch(kernel, plan, 0, stream, p, plan);
    });
  });
  return error;
}

}  // namespace adacache::cuda

// SPDX-License-Identifier: Apache-2.0
// reuse_residual on CUDA.
#include "block.cuh"
#include "bodies/reuse_residual.h"

namespace adacache::cuda {

// Minimum blocks per multiprocessor. Without it the compiler spills registers to reach six. A residual wider
// than x needs two accesses per vector.
template <class Residual, bool flat>
constexpr int reuse_blocks = flat || sizeof(Residual) > 16 ? 4 : 5;

template <class T, int width, class Residual, bool flat>
__global__ void __launch_bounds__(block_threads, reuse_blocks<Residual, flat>) reuse_residual(
    const __grid_constant__ ReuseResidual p, const __grid_constant__ Plan plan) {
  DeviceBlock<block_threads> block;
  if (block.index() < plan.blocks) reuse_residual_body<T, width, Residual, flat>(block, p, plan);
}

cudaError_t reuse_residual(const ReuseResidual& p, cudaStream_t stream) {
  const Plan plan = plan_of(p, block_threads);
  cudaError_t error = cudaSuccess;
  dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int wide = vector_width<T>;
    const auto kernel = [&]() {
      if (plan.width == 1) return reuse_residual<T, 1, AnyElement, false>;
      switch (p.residual.dtype) {
        case DType::float32:
          return plan.flat ? reuse_residual<T, wide, KnownElements<float, wide>, true>
                           : reuse_residual<T, wide, KnownElements<float, wide>, false>;
        case DType::bfloat16:
          return plan.flat ? reuse_residual<T, wide, KnownElements<bfloat16, wide>, true>
                           : reuse_residual<T, wide, KnownElements<bfloat16, wide>, false>;
        case DType::float16:
          return plan.flat ? reuse_residual<T, wide, KnownElements<float16, wide>, true>
                           : reuse_residual<T, wide, KnownElements<float16, wide>, false>;
        default:
          return reuse_residual<T, wide, KnownElements<float8_e4m3, wide>, false>;
      }
    }();
    error = launch(kernel, plan, 0, stream, p, plan);
  });
  return error;
}

}  // namespace adacache::cuda

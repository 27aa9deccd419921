// reuse_residual on CUDA.
#include "block.cuh"

namespace adacache::cuda {

template <class T, int width, class Residual>
__global__ void __launch_bounds__(block_threads, blocks_per_multiprocessor) reuse_residual(
    const __grid_constant__ ReuseResidual p) {
  DeviceBlock block;
  reuse_residual_body<T, width, Residual>(block, p);
}

cudaError_t reuse_residual(const ReuseResidual& p, cudaStream_t stream) {
  const int wide = p.dtype == DType::float32 ? vector_width<float> : vector_width<bfloat16>;
  const bool vectors = vectors_fit(p, wide);
  const int64_t blocks = p.rows * reuse_blocks_per_row(p, vectors ? wide : 1, block_threads);
  if (blocks == 0) return cudaSuccess;
  const auto launch = [&](auto kernel) {
    kernel<<<static_cast<unsigned>(blocks), block_threads, 0, stream>>>(p);
  };
  dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    if (!vectors) return launch(reuse_residual<T, 1, AnyElement>);
    dispatch(p.residual_dtype, [&](auto residual_element) {
      using R = decltype(residual_element);
      launch(reuse_residual<T, vector_width<T>, KnownElements<R, vector_width<T>>>);
    });
  });
  return cudaGetLastError();
}

}  // namespace adacache::cuda

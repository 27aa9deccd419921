// residual_meter on CUDA.
#include "meter.cuh"

namespace adacache::cuda {

template <class T, int width, bool all_columns>
__global__ void __launch_bounds__(block_threads, walk_blocks(all_columns)) residual_meter(
    const __grid_constant__ ResidualMeter p, const __grid_constant__ Plan plan, double* partials) {
  DeviceBlock<block_threads> block;
  if (block.index() < plan.blocks) residual_meter_body<T, width, all_columns>(block, p, plan, partials);
}

int64_t workspace_elements(const ResidualMeter& p) {
  return plan_of(p, block_threads).blocks * sum_columns(p.motion);
}

cudaError_t residual_meter(const ResidualMeter& p, const MeterSums& sums, cudaStream_t stream) {
  const Plan plan = plan_of(p, block_threads);
  cudaError_t error = cudaSuccess;
  dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    // Single elements are the exception: one kernel for them measures all columns.
    const auto kernel = plan.width == 1 ? residual_meter<T, 1, true>
                        : p.all_columns ? residual_meter<T, vector_width<T>, true>
                                        : residual_meter<T, vector_width<T>, false>;
    error = launch(kernel, plan, meter_walk_shared_bytes(p, plan), stream, p, plan, sums.workspace);
  });
  if (error != cudaSuccess) return error;
  return finish_meter(p.shape, p.motion, p.all_columns, plan, sums, stream);
}

}  // namespace adacache::cuda

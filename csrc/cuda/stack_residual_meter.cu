// stack_residual_meter on CUDA.
#include "meter.cuh"

namespace adacache::cuda {

template <class T, int width, bool all_columns>
__global__ void __launch_bounds__(block_threads, walk_blocks(all_columns)) stack_residual_meter(
    const __grid_constant__ StackResidualMeter p, const __grid_constant__ Plan plan, double* partials) {
  DeviceBlock<block_threads> block;
  if (block.index() < plan.blocks) stack_residual_meter_body<T, width, all_columns>(block, p, plan, partials);
}

template <class T, int vectors>
__global__ void __launch_bounds__(most_threads_of_token(vectors, vector_width<T>), token_blocks(vectors))
stack_residual_meter_float8(const __grid_constant__ StackResidualMeter p, const __grid_constant__ Plan plan,
                            double* partials) {
  DeviceBlock<0> block;
  if (block.index() < plan.blocks) stack_residual_meter_float8_body<T, vectors>(block, p, plan, partials);
}

int64_t workspace_elements(const StackResidualMeter& p) {
  return plan_of(p, block_threads).blocks * sum_columns(p.motion);
}

cudaError_t stack_residual_meter(const StackResidualMeter& p, const MeterSums& sums, cudaStream_t stream) {
  const Plan plan = plan_of(p, block_threads);
  cudaError_t error = cudaSuccess;
  dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    if (p.residual.dtype == DType::float8_e4m3) {
      error = with_vectors(plan, [&](auto vectors) {
        return launch(stack_residual_meter_float8<T, vectors>, plan, token_meter_shared_bytes(plan, p.motion),
                      stream, p, plan, sums.workspace);
      });
    } else {
      // Single elements are the exception: one kernel for them measures all columns.
      const auto kernel = plan.width == 1 ? stack_residual_meter<T, 1, true>
                          : p.all_columns ? stack_residual_meter<T, vector_width<T>, true>
                                          : stack_residual_meter<T, vector_width<T>, false>;
      error = launch(kernel, plan, meter_walk_shared_bytes(p, plan), stream, p, plan, sums.workspace);
    }
  });
  if (error != cudaSuccess) return error;
  return finish_meter(p.shape, p.motion, p.all_columns, plan, sums, stream);
}

}  // namespace adacache::cuda

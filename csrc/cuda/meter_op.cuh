// The launch of the meters without a norm. P is GatedResidualMeter, StackResidualMeter or ResidualMeter,
// whose meter_body() and float8_meter_body() are in bodies/.
#pragma once

#include "meter.cuh"

namespace adacache::cuda {

template <class P, class T, int width, bool all_columns>
__global__ void __launch_bounds__(block_threads, walk_blocks(all_columns)) meter(
    const __grid_constant__ P p, const __grid_constant__ Plan plan, double* partials) {
  DeviceBlock<block_threads> block;
  if (block.index() < plan.blocks) meter_body<T, width, all_columns>(block, p, plan, partials);
}

template <class P, class T, int vectors>
__global__ void __launch_bounds__(most_threads_of_token(vectors, vector_width<T>), token_blocks(vectors))
float8_meter(const __grid_constant__ P p, const __grid_constant__ Plan plan, double* partials) {
  DeviceBlock<0> block;
  if (block.index() < plan.blocks) float8_meter_body<T, vectors>(block, p, plan, partials);
}

template <class P>
int64_t workspace_of(const P& p) {
  return plan_of(p, block_threads).blocks * sum_columns(p.motion);
}

// keeps: whether P has a kept residual, which may be float8.
template <bool keeps, class P>
cudaError_t launch_meter(const P& p, const MeterSums& sums, cudaStream_t stream) {
  const Plan plan = plan_of(p, block_threads);
  cudaError_t error = cudaSuccess;
  dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (keeps)
      if (p.residual.dtype == DType::float8_e4m3) {
        error = with_vectors(plan, [&](auto vectors) {
          return launch(float8_meter<P, T, vectors>, plan, token_meter_shared_bytes(plan, p.motion), stream,
                        p, plan, sums.workspace);
        });
        return;
      }
    // The rare unaligned case has one kernel, which measures all columns.
    const auto kernel = plan.width == 1 ? meter<P, T, 1, true>
                        : p.all_columns ? meter<P, T, vector_width<T>, true>
                                        : meter<P, T, vector_width<T>, false>;
    error = launch(kernel, plan, meter_walk_shared_bytes(p, plan), stream, p, plan, sums.workspace);
  });
  if (error != cudaSuccess) return error;
  return finish_meter(p.shape, p.motion, p.all_columns, plan, sums, stream);
}

}  // namespace adacache::cuda

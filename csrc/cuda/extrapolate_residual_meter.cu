// SPDX-License-Identifier: Apache-2.0
// extrapolate_residual_meter on CUDA.
#include "bodies/extrapolate_residual_meter.h"
#include "meter_op.cuh"

namespace adacache::cuda {

int64_t workspace_elements(const ExtrapolateResidualMeter& p) { return workspace_of(p); }

// F is the element type of the factors. 2 blocks per multiprocessor: up to six vectors are loaded ahead,
// which hides the latency of memory with fewer threads, and need the registers.
template <class T, class F, int width, bool all_columns>
__global__ void __launch_bounds__(block_threads, 2) extrapolate_residual_meter(
    const __grid_constant__ ExtrapolateResidualMeter p, const __grid_constant__ Plan plan, double* partials) {
  DeviceBlock<block_threads> block;
  if (block.index() < plan.blocks)
    extrapolate_residual_meter_body<T, F, width, all_columns>(block, p, plan, partials);
}

cudaError_t extrapolate_residual_meter(const ExtrapolateResidualMeter& p, const MeterSums& sums,
                                       cudaStream_t stream) {
  const Plan plan = plan_of(p, block_threads);
  cudaError_t error = cudaSuccess;
  dispatch(p.dtype, [&](auto element) {
    dispatch(p.forecast.factor_dtype, [&](auto factor_element) {
      using T = decltype(element);
      using F = decltype(factor_element);
      constexpr int wide = forecast_width<T, F>;
      // Less common cases have one kernel, which measures all columns.
      const auto kernel = plan.width == 1 ? extrapolate_residual_meter<T, F, 1, true>
                          : p.all_columns ? extrapolate_residual_meter<T, F, wide, true>
                                          : extrapolate_residual_meter<T, F, wide, false>;
      error = launch(kernel, plan, meter_walk_shared_bytes(p, plan), stream, p, plan, sums.workspace);
    });
  });
  if (error != cudaSuccess) return error;
  return finish_meter(p.shape, p.motion, p.all_columns, plan, sums, stream);
}

}  // namespace adacache::cuda

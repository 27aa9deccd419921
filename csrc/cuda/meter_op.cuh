// SPDX-License-Identifier: Apache-2.0
// The launch of the meters without a norm. P is GatedResidualMeter, StackResidualMeter or ResidualMeter,
// whose meter_body() and float8_meter_body() are in bodies/.
#pragma once

#include "meter.cuh"

namespace adacache::cuda {

template <class P, class Element, int width, bool all_columns>
__global__ void __launch_bounds__(block_threads, walk_blocks(all_columns, Elements<Element>::general)) meter(
    const __grid_constant__ P p, const __grid_constant__ Plan plan, double* partials) {
  DeviceBlock<block_threads> block;
  if (block.index() < plan.blocks) meter_body<Element, width, all_columns>(block, p, plan, partials);
}

template <class P, class Element, int vectors>
__global__ void __launch_bounds__(most_threads_of_token(vectors, vector_width<Element>),
                                  token_blocks(vectors, false, Elements<Element>::general))
float8_meter(const __grid_constant__ P p, const __grid_constant__ Plan plan, double* partials) {
  DeviceBlock<0> block;
  if (block.index() < plan.blocks) float8_meter_body<Element, vectors>(block, p, plan, partials);
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
  const auto launch_for = [&](auto element) {
    using Element = decltype(element);
    constexpr int wide = vector_width<Element>;
    if constexpr (keeps)
      if (p.residual.dtype == DType::float8_e4m3) {
        error = with_vectors<Element>(plan, [&](auto vectors) {
          return launch(float8_meter<P, Element, vectors>, plan, token_meter_shared_bytes(plan, p.motion),
                        stream, p, plan, sums.workspace);
        });
        return;
      }
    // Less common cases have one kernel, which measures all columns.
    constexpr bool always_all_columns = Elements<Element>::general;
    const auto kernel = plan.width == 1 ? meter<P, Element, 1, true>
                        : p.all_columns ? meter<P, Element, wide, true>
                                        : meter<P, Element, wide, always_all_columns>;
    error = launch(kernel, plan, meter_walk_shared_bytes(p, plan), stream, p, plan, sums.workspace);
  };
  if constexpr (requires { is_general(p); })
    dispatch(p.dtype, is_general(p), launch_for);
  else
    dispatch(p.dtype, launch_for);
  if (error != cudaSuccess) return error;
  return finish_meter(p.shape, p.motion, p.all_columns, plan, sums, stream);
}

}  // namespace adacache::cuda

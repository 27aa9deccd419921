// SPDX-License-Identifier: Apache-2.0
// gated_residual_norm_meter on CUDA.
#include "bodies/gated_residual_norm_meter.h"
#include "meter.cuh"

namespace adacache::cuda {

// Stored is the type of the kept residual.
template <class Element, class Stored, int vectors>
__global__ void
    __launch_bounds__(most_threads_of_token(vectors, vector_width<Element>),
                      token_blocks(vectors,
                                   !std::is_same_v<Stored, float> && !std::is_same_v<Stored, bfloat16>,
                                   Elements<Element>::general))
    gated_residual_norm_meter(const __grid_constant__ GatedResidualNormMeter p,
                              const __grid_constant__ Plan plan, double* partials) {
  DeviceBlock<0> block;
  if (block.index() < plan.blocks)
    gated_residual_norm_meter_body<Element, Stored, vectors>(block, p, plan, partials);
}

int64_t workspace_elements(const GatedResidualNormMeter& p) {
  return plan_of(p).blocks * sum_columns(p.meter.motion);
}

cudaError_t gated_residual_norm_meter(const GatedResidualNormMeter& p, const MeterSums& sums,
                                      cudaStream_t stream) {
  const GatedResidualMeter& meter = p.meter;
  const Plan plan = plan_of(p);
  cudaError_t error = cudaSuccess;
  dispatch(meter.dtype, is_general(p), [&](auto element) {
    using Element = decltype(element);
    using T = typename Elements<Element>::Type;
    error = with_vectors<Element>(plan, [&](auto vectors) {
      const auto kernel = meter.residual.dtype == DType::float8_e4m3
                              ? gated_residual_norm_meter<Element, float8_e4m3, vectors>
                              : gated_residual_norm_meter<Element, T, vectors>;
      return launch(kernel, plan, token_meter_shared_bytes(plan, meter.motion), stream, p, plan,
                    sums.workspace);
    });
  });
  if (error != cudaSuccess) return error;
  return finish_meter(meter.shape, meter.motion, meter.all_columns, plan, sums, stream);
}

}  // namespace adacache::cuda

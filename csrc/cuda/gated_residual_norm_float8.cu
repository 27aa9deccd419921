// SPDX-License-Identifier: Apache-2.0
// gated_residual_norm_float8 on CUDA.
#include "bodies/gated_residual_norm.h"
#include "token.cuh"

namespace adacache::cuda {

template <class Element, int vectors>
__global__ void __launch_bounds__(most_threads_of_token(vectors, vector_width<Element>),
                                  token_blocks(vectors, /*crowded=*/Elements<Element>::general))
gated_residual_norm_float8(const __grid_constant__ GatedResidualNorm p, const __grid_constant__ Plan plan) {
  DeviceBlock<0> block;
  if (block.index() < plan.blocks) gated_residual_norm_body<Element, vectors, float8_e4m3>(block, p, plan);
}

cudaError_t gated_residual_norm_float8(const GatedResidualNorm& p, cudaStream_t stream) {
  const Plan plan = plan_of(p);
  cudaError_t error = cudaSuccess;
  dispatch(p.residual.dtype, is_general(p), [&](auto element) {
    using Element = decltype(element);
    error = with_vectors<Element>(plan, [&](auto vectors) {
      return launch(gated_residual_norm_float8<Element, vectors>, plan, token_shared_bytes(plan), stream, p,
                    plan);
    });
  });
  return error;
}

}  // namespace adacache::cuda

// SPDX-License-Identifier: Apache-2.0
// norm_modulate_float8 on CUDA.
#include "bodies/layer_norm_modulate.h"
#include "token.cuh"

namespace adacache::cuda {

template <class Element, int vectors>
__global__ void
    __launch_bounds__(most_threads_of_token(vectors, vector_width<Element>), token_blocks(vectors))
    norm_modulate_float8(const __grid_constant__ LayerNormModulate p, const __grid_constant__ Plan plan) {
  DeviceBlock<0> block;
  if (block.index() < plan.blocks) layer_norm_modulate_body<Element, vectors, float8_e4m3>(block, p, plan);
}

cudaError_t norm_modulate_float8(const LayerNormModulate& p, cudaStream_t stream) {
  const Plan plan = plan_of(p);
  cudaError_t error = cudaSuccess;
  dispatch(p.dtype, is_general(p), [&](auto element) {
    using Element = decltype(element);
    error = with_vectors<Element>(plan, [&](auto vectors) {
      return launch(norm_modulate_float8<Element, vectors>, plan, token_shared_bytes(plan), stream, p, plan);
    });
  });
  return error;
}

}  // namespace adacache::cuda

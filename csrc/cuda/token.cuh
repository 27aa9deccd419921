// SPDX-License-Identifier: Apache-2.0
// Shared by the launches of kernels with one token per block at a time.
#pragma once

#include <type_traits>

#include "block.cuh"
#include "bodies/token_walk.h"

namespace adacache::cuda {

// Minimum blocks of maximum size per multiprocessor, by vectors per thread: the largest number without
// spills. crowded: the kernel needs more registers per thread. general: so does a meter of General elements.
constexpr int token_blocks(int vectors, bool crowded = false, bool general = false) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  crowded = true;
#endif
  if (vectors == 1) return crowded || general ? 2 : 3;
  return vectors == 2 && !general ? 2 : 1;
}

// Calls function(std::integral_constant) with plan.vectors_per_thread, for the kernels of this element type.
template <class Element, class Function>
cudaError_t with_vectors(const Plan& plan, const Function& function) {
  switch (plan.vectors_per_thread) {
    case 1:
      return function(std::integral_constant<int, 1>{});
    case 2:
      return function(std::integral_constant<int, 2>{});
    case most_vectors_held:
      if constexpr (most_vectors_of<Element> == most_vectors_held)
        return function(std::integral_constant<int, most_vectors_held>{});
      [[fallthrough]];
    default:
      return function(std::integral_constant<int, 0>{});
  }
}

}  // namespace adacache::cuda

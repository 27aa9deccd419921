// SPDX-License-Identifier: Apache-2.0
// fused_qk_norm_rope.
#pragma once

#include "heads.h"

namespace adacache::cpu {
inline namespace ADACACHE_ISA {

template <class T>
void fused_qk_norm_rope_tokens(const FusedQkNormRope& p, const AttentionUnit& unit) {
  const AttentionScratch& scratch = unit.scratch;
  const int64_t dim = p.shape.dim, stride = rounded_up(dim, lane_count);
  widen_weights<T>(p.norm_rope, dim, scratch);
  for (int64_t n = unit.first; n < unit.last; n += lane_count) {
    const int64_t count = unit.last - n < lane_count ? unit.last - n : lane_count;
    if (p.norm_rope.cos != nullptr)
      gather_angles(p.norm_rope, dim, n, 1, count, scratch, scratch.cos, scratch.sin);
    T* token = token_of<T>(p.qkv, p.strides, unit.row, n);
    for (int64_t head = 0; head < 2 * p.shape.heads; ++head) {
      T* x = token + head * dim;
      gather_lanes(x, p.strides.token, count, dim, scratch.rows, scratch.q);
      norm_and_rope(scratch.q, dim, p.norm_rope, head < p.shape.heads ? scratch.q_weight : scratch.k_weight,
                    scratch.cos, scratch.sin);
      rows_of_lanes(scratch.q, dim, stride, scratch.rows);
      for (int64_t i = 0; i < count; ++i) narrow_row(scratch.rows + i * stride, dim, x + i * p.strides.token);
    }
  }
}

void fused_qk_norm_rope(const FusedQkNormRope& p, const AttentionUnit& unit) {
  with_dtype(p.dtype, [&](auto element) { fused_qk_norm_rope_tokens<decltype(element)>(p, unit); });
}

}  // namespace ADACACHE_ISA
}  // namespace adacache::cpu

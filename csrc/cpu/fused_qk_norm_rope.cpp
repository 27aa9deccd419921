// SPDX-License-Identifier: Apache-2.0
// fused_qk_norm_rope on the CPU.
#include "attention_units.h"

namespace adacache::cpu {

void fused_qk_norm_rope(const FusedQkNormRope& p) {
  const int64_t elements = p.rows * p.tokens * 2 * p.shape.heads * p.shape.dim;
  if (elements == 0 || (!p.norm_rope.q_weight && !p.norm_rope.cos)) return;
  constexpr int64_t tokens_per_unit = 16;
  const Kernels& chosen = kernels();
  for_each_attention_unit(p.rows, p.tokens, tokens_per_unit, tokens_per_unit, p.shape.dim,
                          elements * bytes_of(p.dtype),
                          [&](const AttentionUnit& unit) { chosen.fused_qk_norm_rope(p, unit); });
}

}  // namespace adacache::cpu

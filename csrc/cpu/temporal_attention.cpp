// SPDX-License-Identifier: Apache-2.0
// temporal_attention on the CPU.
#include "attention_units.h"

namespace adacache::cpu {

void temporal_attention(const TemporalAttention& p) {
  const int64_t elements = p.rows * p.frames * p.places * p.shape.heads * p.shape.dim;
  if (elements == 0) return;
  // Amortizes the weights and angles, which are prepared once per unit.
  constexpr int64_t places_per_unit = 4;
  const Kernels& chosen = kernels();
  for_each_attention_unit(p.rows, p.places, places_per_unit, p.frames, p.shape.dim,
                          elements * bytes_of(p.dtype),
                          [&](const AttentionUnit& unit) { chosen.temporal_attention(p, unit); });
}

}  // namespace adacache::cpu

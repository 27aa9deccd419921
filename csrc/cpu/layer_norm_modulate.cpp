// SPDX-License-Identifier: Apache-2.0
// layer_norm_modulate on the CPU.
#include "ops.h"
#include "parallel.h"

namespace adacache::cpu {

void layer_norm_modulate(const LayerNormModulate& p) {
  const Kernels& chosen = kernels();
  const Streaming streaming{.norm = worth_streaming(p.norm, p.x, p.shape, p.dtype)};
  for_each_token_unit(p.shape, p.dtype, streaming,
                      [&](const TokenUnit& unit) { chosen.layer_norm_modulate(p, unit); });
}

}  // namespace adacache::cpu

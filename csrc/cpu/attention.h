// SPDX-License-Identifier: Apache-2.0
// The work unit of the attention ops on the CPU, and its scratch memory.
#pragma once

#include "../core/fused_qk_norm_rope.h"
#include "../core/temporal_attention.h"

namespace adacache::cpu {

// Float32 scratch memory of one thread. Tokens are processed in chunks of 16, one token per lane: [dim][16]
// is one head of one chunk.
struct AttentionScratch {
  float* rows;      // [16][dim, padded to a multiple of 16]: heads in memory order, as float32
  float* q;         // [chunks][dim][16]
  float* k;         // [chunks][dim][16]
  float* v;         // [frames][dim, padded to a multiple of 16]
  float* scores;    // [frames, padded to a multiple of 16][16]: keys by queries
  float* cos;       // [chunks][dim / 2][16]
  float* sin;       // [chunks][dim / 2][16]
  float* q_weight;  // [dim]
  float* k_weight;  // [dim]
};

// Tokens [first, last) of one batch row; for temporal_attention places [first, last), with all frames.
struct AttentionUnit {
  int64_t row, first, last;
  AttentionScratch scratch;
};

}  // namespace adacache::cpu

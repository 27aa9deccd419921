// What both attention ops share on the CPU: their memory, and how work is cut.
#pragma once

#include "../core/fused_qk_norm_rope.h"
#include "../core/temporal_attention.h"

namespace adacache::cpu {

// Float32 memory of one worker. Tokens come in chunks of sixteen, one token per lane, so that "[dim][16]" is
// one head of one chunk.
struct AttentionScratch {
  float* rows;      // [16][dim, up to a multiple of 16]: heads as they lie, widened
  float* q;         // [chunks][dim][16]
  float* k;         // [chunks][dim][16]
  float* v;         // [frames][dim, up to a multiple of 16]
  float* scores;    // [frames, up to a multiple of 16][16]: keys by queries
  float* cos;       // [chunks][dim / 2][16]
  float* sin;       // [chunks][dim / 2][16]
  float* q_weight;  // [dim]
  float* k_weight;  // [dim]
};

}  // namespace adacache::cpu

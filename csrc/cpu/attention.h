// What both attention ops share on the CPU: a unit of work and its memory.
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

// Tokens [first, last) of one row of the batch; of temporal_attention places, with all their frames.
struct AttentionUnit {
  int64_t row, first, last;
  AttentionScratch scratch;
};

}  // namespace adacache::cpu

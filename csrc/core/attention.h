// Shared by the attention ops: the layout of queries, keys and values, and the norm and rotation of queries
// and keys.
#pragma once

#include "tokens.h"

namespace adacache {

// A token's channels are [3, heads, dim]: its queries, then its keys, then its values.
struct HeadShape {
  int64_t heads;
  int64_t dim;
};

// q * rsqrt(mean(q^2) + eps) * weight over a head's dim, then a rotation of pairs of channels:
// (a, b) -> (a cos - b sin, a sin + b cos). Token n takes row n / tokens_per_angle of cos and sin.
struct NormRope {
  const void* q_weight;  // [dim]; null: no norm, of keys neither
  const void* k_weight;
  const float* cos;  // [rows, dim / 2]; null: no rotation
  const float* sin;
  int64_t tokens_per_angle;
  bool interleaved;  // pairs (2i, 2i + 1), not (i, i + dim / 2)
  float eps;
};

}  // namespace adacache

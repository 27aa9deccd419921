// SPDX-License-Identifier: Apache-2.0
// Parameters shared by the attention ops: the layout of q, k and v, and the norm and rotary embedding of q
// and k.
#pragma once

#include "tokens.h"

namespace adacache {

// The channels of a token are [3, heads, dim]: q, k, v.
struct HeadShape {
  int64_t heads;
  int64_t dim;
};

// RMS norm over the head dim, q * rsqrt(mean(q^2) + eps) * weight, then rotation of channel pairs:
// (a, b) -> (a cos - b sin, a sin + b cos). Token n uses row n / tokens_per_angle of cos and sin.
struct NormRope {
  const void* q_weight;  // [dim]; null: no norm of q or k
  const void* k_weight;
  const float* cos;  // [rows, dim / 2]; null: no rotation
  const float* sin;
  int64_t tokens_per_angle;
  bool interleaved;  // pairs (2i, 2i + 1), not (i, i + dim / 2)
  float eps;
};

}  // namespace adacache

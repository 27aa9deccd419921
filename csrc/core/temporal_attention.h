// SPDX-License-Identifier: Apache-2.0
// Parameters of temporal_attention: attention over the frames of each place, read from the packed qkv tensor.
#pragma once

#include "attention.h"

namespace adacache {

constexpr int max_attention_frames = 64;
constexpr int max_head_dim = 256;

struct TemporalAttention {
  const void* qkv;
  void* out;  // [rows, frames * places, heads * dim]
  TokenStrides qkv_strides, out_strides;
  int64_t rows, frames, places;
  HeadShape shape;
  NormRope norm_rope;
  float scale;
  DType dtype;
};

}  // namespace adacache

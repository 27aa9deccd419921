// SPDX-License-Identifier: Apache-2.0
// Parameters of fused_qk_norm_rope: RMS norm and rotary embedding of q and k, in place.
#pragma once

#include "attention.h"

namespace adacache {

struct FusedQkNormRope {
  void* qkv;
  TokenStrides strides;
  int64_t rows, tokens;
  HeadShape shape;
  NormRope norm_rope;
  DType dtype;
};

}  // namespace adacache

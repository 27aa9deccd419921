// RMS norm and rotary embedding of queries and keys, in place: parameters.
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

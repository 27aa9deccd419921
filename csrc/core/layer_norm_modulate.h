// (norm(x) * weight + bias) * (1 + scale) + shift: parameters and device body.
#pragma once

#include "packed.h"
#include "tokens.h"

namespace adacache {

struct LayerNormModulate {
  const void* x;
  TokenStrides x_strides;
  RowIndex x_rows;
  Norm norm;
  TokenShape shape;
  DType dtype;
};

}  // namespace adacache

// SPDX-License-Identifier: Apache-2.0
// Parameters of layer_norm_modulate, rms_norm_modulate and norm_modulate_float8:
// (norm(x) * weight + bias) * (1 + scale) + shift.
#pragma once

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

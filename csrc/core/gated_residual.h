// SPDX-License-Identifier: Apache-2.0
// Parameters of gated_residual: x_out = x + gate * y.
#pragma once

#include "tokens.h"

namespace adacache {

struct GatedResidual {
  const void* x;
  const void* y;
  void* out;  // may be x if x_rows is absent
  TokenStrides x_strides, y_strides, out_strides;
  RowIndex x_rows;
  Modulator gate;
  Rounding rounding;
  TokenShape shape;
  DType dtype;
};

}  // namespace adacache

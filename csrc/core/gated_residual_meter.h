// SPDX-License-Identifier: Apache-2.0
// Parameters of gated_residual_meter: x_out = x + gate * y, r = gate * y stored over the old r, sums of both.
#pragma once

#include "meter.h"
#include "tokens.h"

namespace adacache {

struct GatedResidualMeter {
  const void* x;
  const void* y;
  void* out;  // may be x if x_rows is absent
  TokenStrides x_strides, y_strides, out_strides;
  RowIndex x_rows;
  Modulator gate;
  Rounding rounding;
  Cache residual;
  TokenShape shape;
  MotionStrides motion;
  bool all_columns;
  DType dtype;
};

}  // namespace adacache

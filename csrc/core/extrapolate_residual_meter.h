// SPDX-License-Identifier: Apache-2.0
// Parameters of extrapolate_residual_meter: x_out = x + sum of c_i * F_i, and the sums of this forecast and a
// second forecast of the same factors, or a computed residual.
#pragma once

#include "extrapolate_residual.h"
#include "meter.h"

namespace adacache {

struct ExtrapolateResidualMeter {
  ExtrapolateResidual forecast;
  const float* other_coefficients;  // [videos, factors]; null: `computed` is measured against
  const void* computed;             // in the dtype of x
  TokenStrides computed_strides;
  TokenShape shape;
  MotionStrides motion;
  bool all_columns;
  DType dtype;  // of x

  static constexpr DType residual_dtype =
      DType::float32;  // forecasts are not rounded before they are measured
};

}  // namespace adacache

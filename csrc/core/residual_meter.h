// SPDX-License-Identifier: Apache-2.0
// Parameters of residual_meter: the sums of two given residuals.
#pragma once

#include "meter.h"
#include "tokens.h"

namespace adacache {

struct ResidualMeter {
  const void* residual;
  const void* old;
  TokenStrides residual_strides, old_strides;
  TokenShape shape;
  MotionStrides motion;
  bool all_columns;
  DType dtype;
};

}  // namespace adacache

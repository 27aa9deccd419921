// SPDX-License-Identifier: Apache-2.0
// Parameters of stack_residual_meter: R = x_out - x_in stored over the old R, and the sums of both.
#pragma once

#include "meter.h"
#include "tokens.h"

namespace adacache {

struct StackResidualMeter {
  const void* x_out;  // [rows of the batch]
  const void* x_in;   // [rows.total], like residual and out
  void* out;          // a copy of x_out, may be x_in; null (with strides 0): no copy
  TokenStrides x_out_strides, x_in_strides, out_strides;
  RowIndex rows;  // of x_in and out; equal to residual.rows
  Cache residual;
  TokenShape shape;
  MotionStrides motion;
  bool all_columns;
  DType dtype;
};

}  // namespace adacache

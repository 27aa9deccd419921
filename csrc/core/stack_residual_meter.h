// R = x_out - x_in written over the old R, and the sums between the two: parameters.
#pragma once

#include "meter.h"
#include "tokens.h"

namespace adacache {

struct StackResidualMeter {
  const void* x_out;  // [rows of the batch]
  const void* x_in;   // [rows.total], as residual and out
  void* out;          // null (with strides 0), or where x_out is put: may be x_in
  TokenStrides x_out_strides, x_in_strides, out_strides;
  RowIndex rows;  // of x_in and out; residual.rows is the same
  Cache residual;
  TokenShape shape;
  MotionStrides motion;
  bool all_columns;
  DType dtype;
};

}  // namespace adacache

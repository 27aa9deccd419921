// R = x_out - x_in written over the old R, and the sums between the two: parameters and device body.
#pragma once

#include "gated_residual_meter.h"

namespace adacache {

struct StackResidualMeter {
  const void* x_out;  // [rows of the batch]
  const void* x_in;   // [rows.total], as residual and out
  void* out;          // null, or where x_out is put: may be x_in
  TokenStrides x_out_strides, x_in_strides, out_strides;
  RowIndex rows;  // of x_in and out; residual.rows is the same
  Cache residual;
  TokenShape shape;
  MotionStrides motion;
  bool all_columns;
  DType dtype;
};

}  // namespace adacache

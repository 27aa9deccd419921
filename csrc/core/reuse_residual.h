// x + R for the rows whose video reuses, x for the others: parameters.
#pragma once

#include "tokens.h"

namespace adacache {

struct ReuseResidual {
  const void* x;
  void* out;                    // may be x, if x_rows picks no rows
  const int32_t* video_of_row;  // null: row b belongs to video b, or to the only one
  const bool* reuse;            // by video; null: all reuse
  int64_t videos;
  TokenStrides x_strides, out_strides;
  RowIndex x_rows;
  Cache residual;
  int64_t rows, tokens, channels;
  DType dtype;
};

}  // namespace adacache

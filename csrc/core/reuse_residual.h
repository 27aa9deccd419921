// SPDX-License-Identifier: Apache-2.0
// Parameters of reuse_residual: x + R for the rows of videos that reuse, x for the others.
#pragma once

#include "tokens.h"

namespace adacache {

struct ReuseResidual {
  const void* x;
  void* out;                    // may be x if x_rows is absent
  const int32_t* video_of_row;  // null: row b is video b, or video 0 if videos == 1
  const bool* reuse;            // [videos]; null: all reuse
  int64_t videos;
  TokenStrides x_strides, out_strides;
  RowIndex x_rows;
  Cache residual;
  int64_t rows, tokens, channels;
  DType dtype;
};

}  // namespace adacache

// SPDX-License-Identifier: Apache-2.0
// Parameters of extrapolate_residual: x_out = x + sum of c_i * F_i, the factors of a Taylor or linear
// forecast.
#pragma once

#include "tokens.h"

namespace adacache {

constexpr int max_factors = 4;

struct ExtrapolateResidual {
  const void* x;
  void* out;  // may be x if x_rows is absent
  TokenStrides x_strides, out_strides;
  RowIndex x_rows;
  const void* factor[max_factors];
  TokenStrides factor_strides[max_factors];
  DType factor_dtype;  // not float8
  RowIndex factor_rows;
  int factors;
  const float* coefficients;    // [videos, factors]
  const int32_t* video_of_row;  // null: row b is video b, or video 0 if videos == 1
  int64_t videos;
  int64_t rows, tokens, channels;
  DType dtype;
};

}  // namespace adacache

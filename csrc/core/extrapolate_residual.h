// x_out = x + sum of c_i * F_i, the kept factors of a Taylor or linear forecast: parameters.
#pragma once

#include "tokens.h"

namespace adacache {

constexpr int max_factors = 4;

struct ExtrapolateResidual {
  const void* x;
  void* out;  // may be x, if x_rows picks no rows
  TokenStrides x_strides, out_strides;
  RowIndex x_rows;
  const void* factor[max_factors];
  TokenStrides factor_strides[max_factors];
  DType factor_dtype;  // of all factors; not float8
  RowIndex factor_rows;
  int factors;
  const float* coefficients;    // [videos, factors]
  const int32_t* video_of_row;  // null: row b belongs to video b, or to the only one
  int64_t videos;
  int64_t rows, tokens, channels;
  DType dtype;
};

}  // namespace adacache

// SPDX-License-Identifier: Apache-2.0
// extrapolate_residual.
#pragma once

#include "tokens.h"

namespace adacache::cpu {
inline namespace ADACACHE_ISA {

template <class T, class F>
void extrapolate_residual_tokens(const ExtrapolateResidual& p, const float* coefficients,
                                 const TokenUnit& unit) {
  const int64_t x_row = row_of(p.x_rows, unit.row);
  const int64_t factor_row = row_of(p.factor_rows, unit.row);
  Lanes coefficient[max_factors];
  for (int i = 0; i < p.factors; ++i) coefficient[i] = lanes_of(coefficients[i]);
  for (int64_t n = unit.first; n < unit.last; ++n) {
    const InputToken<T> x = input_token<T>(p.x, p.x_strides, x_row, n);
    T* out = token_of<T>(p.out, p.out_strides, unit.row, n);
    InputToken<F> factor[max_factors];
    for (int i = 0; i < p.factors; ++i)
      factor[i] = input_token<F>(p.factor[i], p.factor_strides[i], factor_row, n);
    for_each_sixteen(p.channels, [&](int64_t c, auto count) ADACACHE_INLINE_LAMBDA {
      Lanes sum = multiply(coefficient[0], widen(load_part(factor[0], c, count)));
      for (int i = 1; i < p.factors; ++i)
        sum = add(sum, multiply(coefficient[i], widen(load_part(factor[i], c, count))));
      put_part(out + c, round<T>(add(widen(load_part(x, c, count)), sum)).stored, count, unit.stream_out);
    });
  }
  if (unit.stream_out || unit.stream_norm) finish_streaming();
}

void extrapolate_residual(const ExtrapolateResidual& p, const float* coefficients, const TokenUnit& unit) {
  with_dtype(p.dtype, [&](auto element) {
    with_dtype(p.factor_dtype, [&](auto kept) {
      extrapolate_residual_tokens<decltype(element), decltype(kept)>(p, coefficients, unit);
    });
  });
}

}  // namespace ADACACHE_ISA
}  // namespace adacache::cpu

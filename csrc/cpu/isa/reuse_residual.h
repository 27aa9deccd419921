// SPDX-License-Identifier: Apache-2.0
// reuse_residual.
#pragma once

#include <type_traits>

#include "tokens.h"

namespace adacache::cpu {
inline namespace ADACACHE_ISA {

template <class T, class R>
void reuse_residual_tokens(const ReuseResidual& p, bool reuse, const TokenUnit& unit) {
  const int64_t x_row = row_of(p.x_rows, unit.row);
  const int64_t residual_row = row_of(p.residual.rows, unit.row);
  for (int64_t n = unit.first; n < unit.last; ++n) {
    const InputToken<T> x = input_token<T>(p.x, p.x_strides, x_row, n);
    T* out = token_of<T>(p.out, p.out_strides, unit.row, n);
    const InputToken<R> residual = input_token<R>(p.residual.data, p.residual.strides, residual_row, n);
    Lanes scale;
    if constexpr (std::is_same_v<R, float8_e4m3>)
      scale = lanes_of(*token_of<float>(p.residual.scale, p.residual.scale_strides, residual_row, n));
    for_each_sixteen(p.channels, [&](int64_t c, auto count) ADACACHE_INLINE_LAMBDA {
      StoredLanes<T> result = load_part(x, c, count);
      if (reuse) {
        Lanes value = widen(load_part(residual, c, count));
        if constexpr (std::is_same_v<R, float8_e4m3>) value = multiply(scale, value);
        result = round<T>(add(widen(result), value)).stored;
      }
      put_part(out + c, result, count, unit.stream_out);
    });
  }
  if (unit.stream_out || unit.stream_norm) finish_streaming();
}

void reuse_residual(const ReuseResidual& p, bool reuse, const TokenUnit& unit) {
  with_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    if (p.residual.dtype == DType::float8_e4m3) return reuse_residual_tokens<T, float8_e4m3>(p, reuse, unit);
    with_dtype(p.residual.dtype,
               [&](auto kept) { reuse_residual_tokens<T, decltype(kept)>(p, reuse, unit); });
  });
}

}  // namespace ADACACHE_ISA
}  // namespace adacache::cpu

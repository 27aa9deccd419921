// SPDX-License-Identifier: Apache-2.0
// layer_norm_modulate.
#pragma once

#include "norm.h"

namespace adacache::cpu {
inline namespace ADACACHE_ISA {

template <class T>
void layer_norm_modulate_tokens(const LayerNormModulate& p, const TokenUnit& unit) {
  const int64_t x_row = row_of(p.x_rows, unit.row);
  TokenNorm<T> token_norm(&p.norm, p.shape, unit.row, unit.scratch, unit.stream_norm);
  for (int64_t n = unit.first; n < unit.last; ++n) {
    const InputToken<T> x = input_token<T>(p.x, p.x_strides, x_row, n);
    NormRow row = token_norm.start_token();
    for_each_sixteen(p.shape.channels, [&](int64_t c, auto count) ADACACHE_INLINE_LAMBDA {
      row.gather(c, widen(load_part(x, c, count)));
    });
    token_norm.put(row, n);
  }
  if (unit.stream_out || unit.stream_norm) finish_streaming();
}

void layer_norm_modulate(const LayerNormModulate& p, const TokenUnit& unit) {
  with_dtype(p.dtype, [&](auto element) { layer_norm_modulate_tokens<decltype(element)>(p, unit); });
}

}  // namespace ADACACHE_ISA
}  // namespace adacache::cpu

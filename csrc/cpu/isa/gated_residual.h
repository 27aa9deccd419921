// gated_residual and gated_residual_norm, and the token that they share with the metered ops.
#pragma once

#include "norm.h"

namespace adacache::cpu {
inline namespace ADACACHE_ISA {

// One token of x + gate * y. Every op that gives it goes through put(), and so they all give the same bits.
template <class T>
struct GatedToken {
  const T* x;
  const T* y;
  const T* gate;  // null: 1
  T* out;
  bool streaming;

  // p: GatedResidual or GatedResidualMeter.
  template <class Parameters>
  GatedToken(const Parameters& p, int64_t row, int64_t x_row, int64_t token, bool streaming)
      : x(token_of<T>(p.x, p.x_strides, x_row, token)),
        y(token_of<T>(p.y, p.y_strides, row, token)),
        gate(token_of<T>(p.gate, row, token / p.shape.places, token % p.shape.places)),
        out(token_of<T>(p.out, p.out_strides, row, token)),
        streaming(streaming) {}

  // Puts x_out, leaves it in `norm` too unless that is null, and gives r.
  ADACACHE_INLINE RoundedLanes<T> put(int64_t c, int64_t count, NormRow* norm) const {
    const StoredLanes<T> stored = load_part(y + c, count);
    RoundedLanes<T> r{stored, widen(stored)};
    if (gate) r = round<T>(multiply(widen(load_part(gate + c, count)), r.value));
    const RoundedLanes<T> sum = round<T>(add(widen(load_part(x + c, count)), r.value));
    put_part(out + c, sum.stored, count, streaming);
    if (norm) norm->gather(c, sum.value);
    return r;
  }
};

template <class T>
void gated_residual_tokens(const GatedResidual& p, const Norm* norm, const TokenUnit& unit) {
  const int64_t x_row = row_of(p.x_rows, unit.row);
  for (int64_t n = unit.first; n < unit.last; ++n) {
    const GatedToken<T> token(p, unit.row, x_row, n, unit.stream_out);
    NormRow row{unit.norm_row, {}};
    for_each_sixteen(p.shape.channels, [&](int64_t c, int64_t count) ADACACHE_INLINE_LAMBDA {
      token.put(c, count, norm ? &row : nullptr);
    });
    if (norm) put_norm<T>(row, *norm, p.shape, unit.row, n, unit.stream_norm);
  }
  if (unit.stream_out || unit.stream_norm) finish_streaming();
}

void gated_residual(const GatedResidual& p, const Norm* norm, const TokenUnit& unit) {
  with_dtype(p.dtype, [&](auto element) { gated_residual_tokens<decltype(element)>(p, norm, unit); });
}

}  // namespace ADACACHE_ISA
}  // namespace adacache::cpu

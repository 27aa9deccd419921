// gated_residual and gated_residual_norm, and GatedToken, shared with the metered ops.
#pragma once

#include "norm.h"

namespace adacache::cpu {
inline namespace ADACACHE_ISA {

// One token of x + gate * y. All ops compute it by put(), so that their results are bit-identical.
template <class T>
struct GatedToken {
  InputToken<T> x;
  InputToken<T> y;
  const T* gate;  // null: 1
  T* out;
  bool streaming;

  // p: GatedResidual or GatedResidualMeter.
  template <class Parameters>
  GatedToken(const Parameters& p, int64_t row, int64_t x_row, int64_t token, bool streaming)
      : x(input_token<T>(p.x, p.x_strides, x_row, token)),
        y(input_token<T>(p.y, p.y_strides, row, token)),
        gate(token_of<T>(p.gate, row, token / p.shape.places, token % p.shape.places)),
        out(token_of<T>(p.out, p.out_strides, row, token)),
        streaming(streaming) {}

  // Stores x_out, passes it to gather(channel, x_out) and returns r.
  template <class Count, class Gather>
  ADACACHE_INLINE RoundedLanes<T> put(int64_t c, Count count, const Gather& gather) const {
    const StoredLanes<T> stored = load_part(y, c, count);
    RoundedLanes<T> r{stored, widen(stored)};
    if (gate) r = round<T>(multiply(widen(load_part(gate + c, count)), r.value));
    const RoundedLanes<T> sum = round<T>(add(widen(load_part(x, c, count)), r.value));
    put_part(out + c, sum.stored, count, streaming);
    gather(c, sum.value);
    return r;
  }
};

template <class T, bool with_norm>
void gated_residual_tokens(const GatedResidual& p, const Norm* norm, const TokenUnit& unit) {
  const int64_t x_row = row_of(p.x_rows, unit.row);
  TokenNorm<T> token_norm(norm, p.shape, unit.row, unit.norm_scratch, unit.stream_norm);
  for (int64_t n = unit.first; n < unit.last; ++n) {
    const GatedToken<T> token(p, unit.row, x_row, n, unit.stream_out);
    NormRow row = token_norm.start_token();
    const auto gather = [&](int64_t c, const Lanes& x_out) ADACACHE_INLINE_LAMBDA {
      if constexpr (with_norm) row.gather(c, x_out);
    };
    for_each_sixteen(p.shape.channels,
                     [&](int64_t c, auto count) ADACACHE_INLINE_LAMBDA { token.put(c, count, gather); });
    if constexpr (with_norm) token_norm.put(row, n);
  }
  if (unit.stream_out || unit.stream_norm) finish_streaming();
}

void gated_residual(const GatedResidual& p, const Norm* norm, const TokenUnit& unit) {
  with_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    (norm ? gated_residual_tokens<T, true> : gated_residual_tokens<T, false>)(p, norm, unit);
  });
}

}  // namespace ADACACHE_ISA
}  // namespace adacache::cpu

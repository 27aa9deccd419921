// SPDX-License-Identifier: Apache-2.0
// gated_residual and gated_residual_norm, and GatedToken, shared with the metered ops.
#pragma once

#include <type_traits>

#include "norm.h"

namespace adacache::cpu {
inline namespace ADACACHE_ISA {

// The gate of the tokens of one batch row as G: the dtype of x, or float32.
template <class T, class G>
class TokenGate {
 public:
  // scratch: [padded_channels] for a gate that is not stored as G.
  TokenGate(const Modulator& gate, const TokenShape& shape, int64_t row, float* scratch)
      : gate_(gate), shape_(shape), row_(row), scratch_(scratch), stored_as_g_(is_stored_as<G>(gate)) {}

  // Null if absent. Valid until the next call.
  const G* of_token(int64_t n) {
    const int64_t frame = n / shape_.places, place = n % shape_.places;
    if constexpr (std::is_same_v<G, float>)
      if (!stored_as_g_) return widened(FloatChannels<T>(gate_, row_, frame, place));
    return token_of<G>(gate_, row_, frame, place);
  }

 private:
  // Cached for consecutive tokens that share a gate.
  const float* widened(const FloatChannels<T>& stored) {
    if (stored.values != widened_)
      for_each_sixteen(shape_.channels, [&](int64_t c, auto count) ADACACHE_INLINE_LAMBDA {
        store(scratch_ + c, stored.load(c, count));
      });
    widened_ = stored.values;
    return scratch_;
  }

  const Modulator& gate_;
  const TokenShape& shape_;
  int64_t row_;
  float* scratch_;
  bool stored_as_g_;
  const void* widened_ = nullptr;
};

// One token of x + gate * y. All ops compute it by put(), so that their results are bit-identical.
template <class T, class G>
struct GatedToken {
  InputToken<T> x;
  InputToken<T> y;
  const G* gate;  // null: 1
  T* out;
  bool streaming;
  bool rounds_once;

  // p: GatedResidual or GatedResidualMeter.
  template <class Parameters>
  GatedToken(const Parameters& p, int64_t row, int64_t x_row, int64_t token, const G* gate, bool streaming)
      : x(input_token<T>(p.x, p.x_strides, x_row, token)),
        y(input_token<T>(p.y, p.y_strides, row, token)),
        gate(gate),
        out(token_of<T>(p.out, p.out_strides, row, token)),
        streaming(streaming),
        rounds_once(gate && p.rounding == Rounding::float32) {}

  // Stores x_out, passes it to gather(channel, x_out) and returns r.
  template <class Count, class Gather>
  ADACACHE_INLINE RoundedLanes<T> put(int64_t c, Count count, const Gather& gather) const {
    const StoredLanes<T> stored = load_part(y, c, count);
    RoundedLanes<T> r{stored, widen(stored)};
    if (gate) r = round<T>(multiply(widen(load_part(gate + c, count)), r.value));
    Lanes added = r.value;
    if constexpr (!std::is_same_v<T, G>)
      if (rounds_once) added = multiply(widen(load_part(gate + c, count)), widen(stored));
    const RoundedLanes<T> sum = round<T>(add(widen(load_part(x, c, count)), added));
    put_part(out + c, sum.stored, count, streaming);
    gather(c, sum.value);
    return r;
  }
};

template <class T, class G, bool with_norm>
void gated_residual_tokens(const GatedResidual& p, const Norm* norm, const TokenUnit& unit) {
  const int64_t x_row = row_of(p.x_rows, unit.row);
  TokenNorm<T> token_norm(norm, p.shape, unit.row, unit.scratch, unit.stream_norm);
  TokenGate<T, G> gate(p.gate, p.shape, unit.row, token_norm.free_scratch());
  for (int64_t n = unit.first; n < unit.last; ++n) {
    const GatedToken<T, G> token(p, unit.row, x_row, n, gate.of_token(n), unit.stream_out);
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

// Calls function(G{}) with the type of the gate for x of type T.
template <class T, class Parameters, class Function>
void with_gate_type(const Parameters& p, T element, const Function& function) {
  if (p.gate.data && (p.gate.dtype == DType::float32 || p.gate.table || p.rounding == Rounding::float32))
    function(float{});
  else
    function(element);
}

void gated_residual(const GatedResidual& p, const Norm* norm, const TokenUnit& unit) {
  with_dtype(p.dtype, [&](auto element) {
    with_gate_type(p, element, [&](auto gate) {
      using T = decltype(element);
      using G = decltype(gate);
      (norm ? gated_residual_tokens<T, G, true> : gated_residual_tokens<T, G, false>)(p, norm, unit);
    });
  });
}

}  // namespace ADACACHE_ISA
}  // namespace adacache::cpu

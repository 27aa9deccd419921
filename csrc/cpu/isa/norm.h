// The layer norm of one token and its modulation, shared by layer_norm_modulate and the ops that end with it.
#pragma once

#include "tokens.h"

namespace adacache::cpu {
inline namespace ADACACHE_ISA {

// A token's values on their way to the norm, in a row of scratch memory that stays in the first-level cache.
struct NormRow {
  float* values;  // a whole number of sixteens
  Lanes sum;

  ADACACHE_INLINE void gather(int64_t channel, const Lanes& lanes) {
    memcpy(values + channel, &lanes, sizeof(lanes));
    sum = sum + lanes;
  }
};

// Puts (norm(v) * weight + bias) * (1 + scale) + shift for the gathered values v, rounded once.
template <class T>
void put_norm(const NormRow& row, const Norm& norm, const TokenShape& shape, int64_t batch_row, int64_t token,
              bool streaming) {
  const int64_t channels = shape.channels;
  const float mean = total(row.sum) / static_cast<float>(channels);
  // What lies past the last channel must not differ from the mean.
  for (int64_t c = channels; c % lane_count != 0; ++c) row.values[c] = mean;
  const Lanes means = lanes_of(mean);
  Lanes squares;
  for (int64_t c = 0; c < channels; c += lane_count) {
    const Lanes difference = widen(load(row.values + c)) - means;
    squares = squares + difference * difference;
  }
  const float variance = total(squares) / static_cast<float>(channels);
  const Lanes inverse_deviation = lanes_of(1 / __builtin_sqrtf(variance + norm.eps));

  const int64_t frame = token / shape.places;
  const int64_t place = token % shape.places;
  const T* weight = static_cast<const T*>(norm.weight);
  const T* bias = static_cast<const T*>(norm.bias);
  const T* scale = token_of<T>(norm.scale, batch_row, frame, place);
  const T* shift = token_of<T>(norm.shift, batch_row, frame, place);
  const Lanes one = lanes_of(1);
  T* out = token_of<T>(norm.out, norm.out_strides, batch_row, token);
  for_each_sixteen(channels, [&](int64_t c, int64_t count) ADACACHE_INLINE_LAMBDA {
    Lanes value = (widen(load(row.values + c)) - means) * inverse_deviation;
    if (weight) value = value * widen(load_part(weight + c, count));
    if (bias) value = value + widen(load_part(bias + c, count));
    if (scale) value = value * (one + widen(load_part(scale + c, count)));
    if (shift) value = value + widen(load_part(shift + c, count));
    put_part(out + c, round<T>(value).stored, count, streaming);
  });
}

}  // namespace ADACACHE_ISA
}  // namespace adacache::cpu

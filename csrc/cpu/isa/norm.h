// SPDX-License-Identifier: Apache-2.0
// The modulated norm of one token, shared by the norms and the fused ops.
#pragma once

#include "tokens.h"

namespace adacache::cpu {
inline namespace ADACACHE_ISA {

// Two alternating accumulators hide the latency of the additions.
struct TwoSums {
  Lanes next, last;

  ADACACHE_INLINE void gather(const Lanes& lanes) {
    for (int i = 0; i < registers; ++i) {
      const FloatRegister sum = next.part[i] + lanes.part[i];
      next.part[i] = last.part[i];
      last.part[i] = sum;
    }
  }
  float total_of_both() const { return total(next + last); }
};

// The values of a token before the norm, in scratch memory that fits the L1 cache.
struct NormRow {
  float* values;
  TwoSums sums;

  ADACACHE_INLINE void gather(int64_t channel, const Lanes& lanes) {
    store(values + channel, lanes);
    sums.gather(lanes);
  }
};

// Norm of tokens of one batch row.
template <class T>
class TokenNorm {
 public:
  // norm may be null if put() is not called.
  TokenNorm(const Norm* norm, const TokenShape& shape, int64_t row, float* scratch, bool streaming)
      : norm_(norm),
        shape_(shape),
        row_(row),
        values_(scratch),
        factor_(scratch + padded_channels(shape.channels)),
        offset_(factor_ + padded_channels(shape.channels)),
        streaming_(streaming),
        plain_(norm && is_stored_as<T>(norm->shift) && is_stored_as<T>(norm->scale) &&
               is_stored_as<T>(norm->weight) && is_stored_as<T>(norm->bias)) {}

  NormRow start_token() const { return {values_, {}}; }

  // A row of the scratch memory that the norm does not use.
  float* free_scratch() const { return offset_ + padded_channels(shape_.channels); }

  // Stores (norm(v) * weight + bias) * (1 + scale) + shift of the gathered values v, rounded once, to T or to
  // float8.
  void put(const NormRow& row, int64_t token) {
    const int64_t channels = shape_.channels;
    const bool centered = norm_->kind == NormKind::layer;
    const float mean = centered ? row.sums.total_of_both() / static_cast<float>(channels) : 0.0f;
    // Padding equal to the mean adds 0 to the variance.
    for (int64_t c = channels; c % lane_count != 0; ++c) values_[c] = mean;
    const Lanes means = lanes_of(mean);
    TwoSums squares;
    for (int64_t c = 0; c < channels; c += lane_count) {
      const Lanes difference = widen(load(values_ + c)) - means;
      squares.gather(difference * difference);
    }
    const float variance = squares.total_of_both() / static_cast<float>(channels);
    const Lanes inverse_deviation = lanes_of(1 / __builtin_sqrtf(variance + norm_->eps));

    prepare_modulation(token / shape_.places, token % shape_.places);
    const float* factor = factor_;
    const float* offset = offset_;
    const float* values = values_;
    const auto modulated = [=](int64_t c) ADACACHE_INLINE_LAMBDA {
      const Lanes normed = (widen(load(values + c)) - means) * inverse_deviation;
      return normed * widen(load(factor + c)) + widen(load(offset + c));
    };
    if (norm_->out_scale) return put_float8(token, modulated);
    const bool streaming = streaming_;
    T* out = token_of<T>(norm_->out, norm_->out_strides, row_, token);
    for_each_sixteen(channels, [=](int64_t c, auto count) ADACACHE_INLINE_LAMBDA {
      put_part(out + c, round<T>(modulated(c)).stored, count, streaming);
    });
  }

 private:
  // The scale is known only after the last channel: the float32 values replace those before the norm.
  template <class Modulated>
  void put_float8(int64_t token, const Modulated& modulated) {
    float* values = values_;
    LargestMagnitude magnitudes;
    for_each_sixteen(shape_.channels, [&](int64_t c, auto count) ADACACHE_INLINE_LAMBDA {
      store(values + c, modulated(c));
      magnitudes.gather(widen(load_part(values + c, count)));
    });
    const float largest = magnitudes.largest();
    *token_of<float>(norm_->out_scale, norm_->out_scale_strides, row_, token) = float8_scale(largest);
    const Lanes inverse = lanes_of(float8_inverse_scale(largest));
    const bool streaming = streaming_;
    auto* out = token_of<float8_e4m3>(norm_->out, norm_->out_strides, row_, token);
    for_each_sixteen(shape_.channels, [=](int64_t c, auto count) ADACACHE_INLINE_LAMBDA {
      const Lanes value = multiply(widen(load(values + c)), inverse);
      put_part(out + c, round<float8_e4m3>(value).stored, count, streaming);
    });
  }

  // factor = weight * (1 + scale), offset = bias * (1 + scale) + shift; cached for consecutive tokens that
  // share them.
  void prepare_modulation(int64_t frame, int64_t place) {
    if (plain_)
      prepare<StoredChannels<T>>(frame, place);
    else
      prepare<FloatChannels<T>>(frame, place);
  }

  template <class Channels>
  void prepare(int64_t frame, int64_t place) {
    const Channels scale(norm_->scale, row_, frame, place), shift(norm_->shift, row_, frame, place);
    if (prepared_ && scale.values == scale_ && shift.values == shift_) return;
    prepared_ = true;
    scale_ = scale.values;
    shift_ = shift.values;
    const Channels weight(norm_->weight), bias(norm_->bias);
    for_each_sixteen(shape_.channels, [&](int64_t c, auto count) ADACACHE_INLINE_LAMBDA {
      Lanes factor = lanes_of(1);
      Lanes offset;
      if (scale) factor = factor + scale.load(c, count);
      if (bias) offset = factor * bias.load(c, count);
      if (shift) offset = offset + shift.load(c, count);
      if (weight) factor = factor * weight.load(c, count);
      store(factor_ + c, factor);
      store(offset_ + c, offset);
    });
  }

  const Norm* norm_;
  const TokenShape& shape_;
  int64_t row_;
  float* values_;
  float* factor_;
  float* offset_;
  bool streaming_;
  bool plain_;  // weight, bias and modulators are in the dtype of x and without tables
  bool prepared_ = false;
  const void* scale_ = nullptr;
  const void* shift_ = nullptr;
};

}  // namespace ADACACHE_ISA
}  // namespace adacache::cpu

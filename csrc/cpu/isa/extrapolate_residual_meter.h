// SPDX-License-Identifier: Apache-2.0
// extrapolate_residual_meter.
#pragma once

#include "meter.h"

namespace adacache::cpu {
inline namespace ADACACHE_ISA {

template <class T, class F, bool all_columns>
void extrapolate_residual_meter_unit(const ExtrapolateResidualMeter& p, const MeterUnit& unit) {
  const ExtrapolateResidual& f = p.forecast;
  const int64_t x_row = row_of(f.x_rows, unit.row);
  const int64_t factor_row = row_of(f.factor_rows, unit.row);
  const int64_t video = f.video_of_row ? f.video_of_row[unit.row] : 0;
  Lanes coefficient[max_factors], other[max_factors];
  for (int i = 0; i < f.factors; ++i) {
    coefficient[i] = lanes_of(f.coefficients[video * f.factors + i]);
    if (p.other_coefficients) other[i] = lanes_of(p.other_coefficients[video * f.factors + i]);
  }
  // The forecasts of this frame and of those that motion reads.
  const int64_t channels = padded_channels(p.shape.channels), frames = waiting_frames(p.motion);
  const int64_t places = unit.end_place - unit.first_place;
  const auto waiting = [&, memory = static_cast<float*>(unit.waiting)](int64_t frame, int64_t place) {
    return memory + (frame % frames * places + place - unit.first_place) * channels;
  };
  walk_unit<all_columns>(
      p.shape, p.motion, unit,
      [&](int64_t frame, int64_t place, int64_t n, Meter<all_columns>& meter) {
        const InputToken<T> x = input_token<T>(f.x, f.x_strides, x_row, n);
        T* out = token_of<T>(f.out, f.out_strides, unit.row, n);
        InputToken<F> factor[max_factors];
        for (int i = 0; i < f.factors; ++i)
          factor[i] = input_token<F>(f.factor[i], f.factor_strides[i], factor_row, n);
        const InputToken<T> computed =
            p.computed ? input_token<T>(p.computed, p.computed_strides, unit.row, n) : InputToken<T>{};
        float* forecast = waiting(frame, place);
        for_each_sixteen(p.shape.channels, [&](int64_t c, auto count) ADACACHE_INLINE_LAMBDA {
          const auto sum_with = [&](const Lanes(&by)[max_factors]) ADACACHE_INLINE_LAMBDA {
            Lanes sum = multiply(by[0], widen(load_part(factor[0], c, count)));
            for (int i = 1; i < f.factors; ++i)
              sum = add(sum, multiply(by[i], widen(load_part(factor[i], c, count))));
            return sum;
          };
          const Lanes sum = sum_with(coefficient);
          meter.measure(sum, p.computed ? widen(load_part(computed, c, count)) : sum_with(other));
          store(forecast + c, sum);
          put_part(out + c, round<T>(add(widen(load_part(x, c, count)), sum)).stored, count, unit.stream_out);
        });
      },
      [&](int64_t frame, int64_t place, int64_t) -> const float* { return waiting(frame, place); });
  if (unit.stream_out || unit.stream_norm) finish_streaming();
}

void extrapolate_residual_meter(const ExtrapolateResidualMeter& p, const MeterUnit& unit) {
  with_dtype(p.dtype, [&](auto element) {
    with_dtype(p.forecast.factor_dtype, [&](auto kept) {
      using T = decltype(element);
      using F = decltype(kept);
      (p.all_columns ? extrapolate_residual_meter_unit<T, F, true>
                     : extrapolate_residual_meter_unit<T, F, false>)(p, unit);
    });
  });
}

}  // namespace ADACACHE_ISA
}  // namespace adacache::cpu

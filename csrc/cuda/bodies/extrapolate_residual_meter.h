// SPDX-License-Identifier: Apache-2.0
// Device body of extrapolate_residual_meter: x_out = x + sum of c_i * F_i, and the sums of this forecast and
// a second one, or a computed residual.
#pragma once

#include "../../core/extrapolate_residual_meter.h"
#include "extrapolate_residual.h"
#include "meter_walk.h"

namespace adacache {

inline namespace ADACACHE_ISA {

// Computes the forecast at the tokens of a walk, and stores x plus the forecast.
template <class T, class F, int width_>
class ForecastSource {
 public:
  using Element = T;
  static constexpr int width = width_;
  using Values = Packed<float, width>;  // the forecast
  using Stream = Packed<T, width>;
  using Factor = Packed<F, width>;
  struct Loaded {
    Stream x, computed;
    Factor factor[max_factors];
  };

  ADACACHE_HD ForecastSource(const ExtrapolateResidualMeter& p, const Steps& steps, const Walk& walk,
                             int64_t channel)
      : p_(p),
        video_(video_of(p, walk.row)),
        x_(static_cast<const T*>(p.forecast.x), p.forecast.x_strides, row_of(p.forecast.x_rows, walk.row),
           walk, channel, steps.x),
        computed_(static_cast<const T*>(p.computed), p.computed_strides, walk.row, walk,
                  p.computed ? channel : 0, steps.y),
        out_(static_cast<T*>(p.forecast.out), p.forecast.out_strides, walk.row, walk, channel, steps.out),
        factor_{factor_cursor(p, steps, walk, channel, 0), factor_cursor(p, steps, walk, channel, 1),
                factor_cursor(p, steps, walk, channel, 2), factor_cursor(p, steps, walk, channel, 3)} {
    static_assert(max_factors == 4);
  }

  // Whether the rows and the video exist.
  static ADACACHE_HD bool readable(const ExtrapolateResidualMeter& p, int64_t row) {
    const int64_t video = video_of(p, row);
    return row_of(p.forecast.x_rows, row) >= 0 && row_of(p.forecast.factor_rows, row) >= 0 && video >= 0 &&
           video < p.forecast.videos;
  }
  static ADACACHE_HD void poison(const ExtrapolateResidualMeter& p, const Steps& steps, const Walk& walk,
                                 int64_t channel, int) {
    Cursor<T> out(static_cast<T*>(p.forecast.out), p.forecast.out_strides, walk.row, walk, channel,
                  steps.out);
    for (int i = 0; i < walk.count; ++i, out.advance()) all_nan<Stream, width>().store(out.at(0));
  }

  ADACACHE_HD void load(Loaded& loaded, int64_t offset, int) const {
    loaded.x = Stream::load(x_.at(offset));
    if (p_.computed != nullptr) loaded.computed = Stream::load(computed_.at(offset));
    load_factors(loaded, 0, offset);
  }
  ADACACHE_HD void load_next(Loaded& loaded, int64_t offset, int count) const { load(loaded, offset, count); }

  ADACACHE_HD Values residual(const Loaded& loaded) const {
    return sum_with(p_.forecast.coefficients, loaded);
  }
  // What the forecast is measured against.
  ADACACHE_HD Values compared(const Loaded& loaded) const {
    if (p_.computed == nullptr) return sum_with(p_.other_coefficients, loaded);
    float values[width];
    ADACACHE_UNROLL
    for (int c = 0; c < width; ++c) values[c] = loaded.computed.get(c);
    return Values::of(values);
  }
  ADACACHE_HD Values residual_at(int64_t steps, int64_t offset, int) const {
    Loaded loaded{};
    load_factors(loaded, steps, offset);
    return residual(loaded);
  }

  ADACACHE_HD Stream result(const Loaded& loaded, const Values& forecast) const {
    float values[width];
    ADACACHE_UNROLL
    for (int c = 0; c < width; ++c) values[c] = add(loaded.x.get(c), forecast.get(c));
    return Stream::of(values);
  }
  ADACACHE_HD void store_result(const Stream& result, int64_t offset, int) const {
    result.store(out_.at(offset));
  }

  ADACACHE_HD void advance() {
    x_.advance();
    computed_.advance();
    out_.advance();
    ADACACHE_UNROLL
    for (int i = 0; i < max_factors; ++i) factor_[i].advance();
  }

 private:
  static ADACACHE_HD int64_t video_of(const ExtrapolateResidualMeter& p, int64_t row) {
    return p.forecast.video_of_row ? p.forecast.video_of_row[row] : 0;
  }
  static ADACACHE_HD Cursor<const F> factor_cursor(const ExtrapolateResidualMeter& p, const Steps& steps,
                                                   const Walk& walk, int64_t channel, int i) {
    return {static_cast<const F*>(p.forecast.factor[i]), p.forecast.factor_strides[i],
            row_of(p.forecast.factor_rows, walk.row),    walk,
            i < p.forecast.factors ? channel : 0,        steps.factor[i]};
  }
  ADACACHE_HD void load_factors(Loaded& loaded, int64_t steps, int64_t offset) const {
    ADACACHE_UNROLL
    for (int i = 0; i < max_factors; ++i)
      if (i < p_.forecast.factors) loaded.factor[i] = Factor::load(factor_[i].ahead(steps, offset));
  }
  // Summed from left to right in float32. The coefficients are read again for each token, from the L1 cache:
  // registers for them would lower the occupancy.
  ADACACHE_HD Values sum_with(const float* coefficients, const Loaded& loaded) const {
    const int factors = p_.forecast.factors;
    const float* own = coefficients + video_ * factors;
    float sum[width];
    ADACACHE_UNROLL
    for (int c = 0; c < width; ++c) sum[c] = multiply(own[0], loaded.factor[0].get(c));
    ADACACHE_UNROLL
    for (int i = 1; i < max_factors; ++i) {
      if (i >= factors) break;
      ADACACHE_UNROLL
      for (int c = 0; c < width; ++c) sum[c] = add(sum[c], multiply(own[i], loaded.factor[i].get(c)));
    }
    return Values::of(sum);
  }

  const ExtrapolateResidualMeter& p_;
  int64_t video_;
  Cursor<const T> x_, computed_;
  Cursor<T> out_;
  Cursor<const F> factor_[max_factors];
};

// No tensor has more than 16 bytes per access: wider factors would need too many registers.
template <class T, class F>
constexpr int forecast_width = vector_width<T> < vector_width<F> ? vector_width<T> : vector_width<F>;

// The source has what the forecast is measured against. Nothing is kept.
template <class Values>
struct NoOldVectors {
  ADACACHE_HD NoOldVectors(const ExtrapolateResidualMeter&, const Steps&, const Walk&, int64_t) {}
  static ADACACHE_HD bool readable(const ExtrapolateResidualMeter&, int64_t) { return true; }
  ADACACHE_HD Values load() const { return {}; }
  ADACACHE_HD void store(const Values&) const {}
  ADACACHE_HD void advance() {}
};

template <class T, class F, int width, bool all_columns, class Block>
ADACACHE_HD void extrapolate_residual_meter_body(Block& block, const ExtrapolateResidualMeter& p,
                                                 const Plan& plan, double* partials) {
  meter_walk<ForecastSource<T, F, width>, NoOldVectors<Packed<float, width>>, all_columns>(block, p, plan,
                                                                                           partials);
}

}  // namespace ADACACHE_ISA

inline bool vectors_fit(const ExtrapolateResidualMeter& p, int width) {
  return vectors_fit(p.forecast, width) &&
         (p.computed == nullptr || vectors_are_aligned(p.computed, p.computed_strides, p.dtype, width));
}

inline Plan plan_of(const ExtrapolateResidualMeter& p, int threads) {
  const int of_x = vector_width_of(p.dtype), of_factor = vector_width_of(p.forecast.factor_dtype);
  const int wide = of_x < of_factor ? of_x : of_factor;
  Plan plan = plan_meter_walk(p, vectors_fit(p, wide) ? wide : 1, /*divisible=*/true, threads);
  plan.steps.x = step_of(p.forecast.x_strides, p.shape, /*along_frames=*/true, p.dtype);
  plan.steps.y = step_of(p.computed_strides, p.shape, /*along_frames=*/true, p.dtype);
  plan.steps.out = step_of(p.forecast.out_strides, p.shape, /*along_frames=*/true, p.dtype);
  for (int i = 0; i < max_factors; ++i)
    plan.steps.factor[i] =
        step_of(p.forecast.factor_strides[i], p.shape, /*along_frames=*/true, p.forecast.factor_dtype);
  return plan;
}

}  // namespace adacache

// SPDX-License-Identifier: Apache-2.0
// Device body of extrapolate_residual: x_out = x + sum of c_i * F_i, the factors of a Taylor or linear
// forecast.
#pragma once

#include "../../core/extrapolate_residual.h"
#include "elementwise.h"

namespace adacache {

inline namespace ADACACHE_ISA {

// x + (c_0 * F_0 + c_1 * F_1 + ...), summed from left to right in float32, rounded once.
template <class T, class F, int width, class Block>
ADACACHE_HD void extrapolate_residual_body(Block& block, const ExtrapolateResidual& p, const Plan& plan) {
  using Values = Packed<T, width>;
  struct Loaded {
    Values x;
    Packed<F, width> factor[max_factors];
  };
  const int64_t of_row = divide(block.index(), plan.blocks_per_row).quotient;
  const int64_t x_row = row_of(p.x_rows, of_row);
  const int64_t factor_row = row_of(p.factor_rows, of_row);
  const int64_t video = p.video_of_row ? p.video_of_row[of_row] : p.videos == 1 ? 0 : of_row;
  // Out-of-range rows become NaN, as in reuse_residual.
  const bool known = x_row >= 0 && factor_row >= 0 && video >= 0 && video < p.videos;
  float coefficient[max_factors] = {};
  ADACACHE_UNROLL
  for (int i = 0; i < max_factors; ++i)
    if (known && i < p.factors) coefficient[i] = p.coefficients[video * p.factors + i];
  visit_elements<Loaded, width>(
      block, plan, p.tokens, p.channels,
      [&](int64_t, int64_t token, int64_t channel) {
        Loaded loaded{};
        if (!known) return loaded;
        loaded.x = Values::load(token_at<T>(p.x, p.x_strides, x_row, token, channel));
        ADACACHE_UNROLL
        for (int i = 0; i < max_factors; ++i)
          if (i < p.factors)
            loaded.factor[i] = Packed<F, width>::load(
                token_at<F>(p.factor[i], p.factor_strides[i], factor_row, token, channel));
        return loaded;
      },
      [&](int64_t row, int64_t token, int64_t channel, const Loaded& loaded) {
        float forecast[width];
        ADACACHE_UNROLL
        for (int c = 0; c < width; ++c) forecast[c] = multiply(coefficient[0], loaded.factor[0].get(c));
        ADACACHE_UNROLL
        for (int i = 1; i < max_factors; ++i) {
          if (i >= p.factors) break;
          ADACACHE_UNROLL
          for (int c = 0; c < width; ++c)
            forecast[c] = add(forecast[c], multiply(coefficient[i], loaded.factor[i].get(c)));
        }
        float values[width];
        ADACACHE_UNROLL
        for (int c = 0; c < width; ++c) values[c] = add(loaded.x.get(c), forecast[c]);
        const Values out = known ? Values::of(values) : all_nan<Values, width>();
        out.store(token_at<T>(p.out, p.out_strides, row, token, channel));
      });
}

}  // namespace ADACACHE_ISA

inline bool vectors_fit(const ExtrapolateResidual& p, int width) {
  bool fit = p.channels % width == 0 && vectors_are_aligned(p.x, p.x_strides, p.dtype, width) &&
             vectors_are_aligned(p.out, p.out_strides, p.dtype, width);
  for (int i = 0; i < p.factors; ++i)
    fit = fit && vectors_are_aligned(p.factor[i], p.factor_strides[i], p.factor_dtype, width);
  return fit;
}

inline Plan plan_of(const ExtrapolateResidual& p, int threads) {
  const int wide = vector_width_of(p.dtype);
  return plan_elementwise(p.rows, p.tokens, p.channels, vectors_fit(p, wide) ? wide : 1, threads);
}

}  // namespace adacache

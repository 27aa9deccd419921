// SPDX-License-Identifier: Apache-2.0
// Device body of stack_residual_meter: R = x_out - x_in stored over the old R, and the sums of both.
#pragma once

#include "../../core/stack_residual_meter.h"
#include "meter_walk.h"
#include "token_walk.h"

namespace adacache {

inline namespace ADACACHE_ISA {

// Computes R at the tokens of a walk, and copies x_out to `out`.
template <class T, int width_, bool whole>
class StackSource {
 public:
  using Element = T;
  static constexpr int width = width_;
  using Values = Packed<T, width>;
  struct Loaded {
    Values x_out, x_in;
  };
  static constexpr bool result_covers_input = true;

  ADACACHE_HD StackSource(const StackResidualMeter& p, const Steps& steps, const Walk& walk, int64_t channel)
      : x_out_(static_cast<const T*>(p.x_out), p.x_out_strides, walk.row, walk, channel, steps.x),
        x_in_(static_cast<const T*>(p.x_in), p.x_in_strides, row_of(p.rows, walk.row), walk, channel,
              steps.y),
        out_(static_cast<T*>(p.out), p.out_strides, row_of(p.rows, walk.row), walk, p.out ? channel : 0,
             steps.out),
        puts_out_(p.out != nullptr) {}

  static ADACACHE_HD bool readable(const StackResidualMeter& p, int64_t row) {
    return row_of(p.rows, row) >= 0;
  }
  // `out` is indexed by the same row, which is out of range.
  static ADACACHE_HD void poison(const StackResidualMeter&, const Steps&, const Walk&, int64_t, int) {}

  ADACACHE_HD void load(Loaded& loaded, int64_t offset, int count) const { loaded = at(0, offset, count); }
  ADACACHE_HD void load_next(Loaded& loaded, int64_t offset, int count) const { load(loaded, offset, count); }

  ADACACHE_HD Values residual(const Loaded& loaded) const {
    float r[width];
    ADACACHE_UNROLL
    for (int c = 0; c < width; ++c) r[c] = add(loaded.x_out.get(c), -loaded.x_in.get(c));
    return Values::of(r);
  }
  // Recomputes R of a token `steps` away; of an earlier one only if `out` is not x_in.
  ADACACHE_HD Values residual_at(int64_t steps, int64_t offset, int count) const {
    return residual(at(steps, offset, count));
  }

  ADACACHE_HD Values result(const Loaded& loaded, const Values&) const { return loaded.x_out; }
  ADACACHE_HD void store_result(const Values& result, int64_t offset, int count) const {
    if (puts_out_) store_vector<whole>(result, out_.at(offset), count);
  }

  ADACACHE_HD void advance() {
    x_out_.advance();
    x_in_.advance();
    out_.advance();
  }

 private:
  ADACACHE_HD Loaded at(int64_t steps, int64_t offset, int count) const {
    return {load_vector<whole, width>(x_out_.ahead(steps, offset), count),
            load_vector<whole, width>(x_in_.ahead(steps, offset), count)};
  }

  Cursor<const T> x_out_, x_in_;
  Cursor<T> out_;
  bool puts_out_;
};

template <class T, int width, bool all_columns, class Block>
ADACACHE_HD void meter_body(Block& block, const StackResidualMeter& p, const Plan& plan, double* partials) {
  meter_walk<StackSource<T, width, true>, KeptVectors<T, width>, all_columns>(block, p, plan, partials);
}

// For a residual kept in float8.
template <class T, int vectors, class Block>
ADACACHE_HD void float8_meter_body(Block& block, const StackResidualMeter& p, const Plan& plan,
                                   double* partials) {
  constexpr bool whole = vectors > 0;
  constexpr int width = vector_width<T>;
  token_walk<StackSource<T, width, whole>, KeptTokens<T, float8_e4m3, width, whole>, NoNorm, vectors>(
      block, p, NothingNormed{}, plan, partials);
}

}  // namespace ADACACHE_ISA

inline bool vectors_fit(const StackResidualMeter& p, int width) {
  return p.shape.channels % width == 0 && vectors_are_aligned(p.x_out, p.x_out_strides, p.dtype, width) &&
         vectors_are_aligned(p.x_in, p.x_in_strides, p.dtype, width) &&
         (p.out == nullptr || vectors_are_aligned(p.out, p.out_strides, p.dtype, width)) &&
         vectors_are_aligned(p.residual, width);
}

// A segment reads x_in of frames of the previous segment, which are overwritten if `out` is x_in.
inline bool frames_divisible(const StackResidualMeter& p) { return p.out == nullptr || p.out != p.x_in; }

inline Steps stack_steps(const StackResidualMeter& p) {
  Steps steps{};
  steps.x = step_of(p.x_out_strides, p.shape, /*along_frames=*/true, p.dtype);
  steps.y = step_of(p.x_in_strides, p.shape, /*along_frames=*/true, p.dtype);
  steps.out = step_of(p.out_strides, p.shape, /*along_frames=*/true, p.dtype);
  set_cache_steps(steps, p.residual, p.shape);
  return steps;
}

inline Plan plan_of(const StackResidualMeter& p, int threads) {
  const int wide = vector_width_of(p.dtype);
  const bool fit = vectors_fit(p, wide);
  Plan plan = p.residual.dtype == DType::float8_e4m3
                  ? plan_token_meter(p, fit, /*general=*/false, frames_divisible(p))
                  : plan_meter_walk(p, fit ? wide : 1, frames_divisible(p), threads);
  plan.steps = stack_steps(p);
  return plan;
}

}  // namespace adacache

// SPDX-License-Identifier: Apache-2.0
// Device body of layer_norm_modulate and norm_modulate_float8: (norm(x) * weight + bias) * (1 + scale) +
// shift.
#pragma once

#include "../../core/layer_norm_modulate.h"
#include "token_walk.h"

namespace adacache {

inline namespace ADACACHE_ISA {

// A Source whose result is x.
template <class T, int width_, bool whole>
class PlainSource {
 public:
  using Element = T;
  static constexpr int width = width_;
  using Values = Packed<T, width>;
  using Loaded = Values;
  static constexpr bool result_covers_input = false;

  ADACACHE_HD PlainSource(const LayerNormModulate& p, const Steps& steps, const Walk& walk, int64_t channel)
      : x_(static_cast<const T*>(p.x), p.x_strides, row_of(p.x_rows, walk.row), walk, channel, steps.x) {}

  static ADACACHE_HD bool readable(const LayerNormModulate& p, int64_t row) {
    return row_of(p.x_rows, row) >= 0;
  }
  static ADACACHE_HD void poison(const LayerNormModulate&, const Steps&, const Walk&, int64_t, int) {}
  ADACACHE_HD void load(Loaded& loaded, int64_t offset, int count) const {
    loaded = result_again(offset, count);
  }
  ADACACHE_HD void load_next(Loaded& loaded, int64_t offset, int count) const { load(loaded, offset, count); }
  ADACACHE_HD Values residual(const Loaded&) const { return {}; }
  ADACACHE_HD Values result(const Loaded& loaded, const Values&) const { return loaded; }
  ADACACHE_HD Values result_again(int64_t offset, int count) const {
    return load_vector<whole, width>(x_.at(offset), count);
  }
  ADACACHE_HD void store_result(const Values&, int64_t, int) const {}
  ADACACHE_HD void advance() { x_.advance(); }

 private:
  Cursor<const T> x_;
};

// Stored: the type of the norm, that of x or float8_e4m3.
template <class Element, int vectors, class Stored = typename Elements<Element>::Type, class Block>
ADACACHE_HD void layer_norm_modulate_body(Block& block, const LayerNormModulate& p, const Plan& plan) {
  constexpr bool whole = vectors > 0;
  using T = typename Elements<Element>::Type;
  constexpr int width = vector_width<T>;
  token_walk<PlainSource<T, width, whole>, NothingKept, NormedTokens<Element, Stored, width, whole>, vectors>(
      block, p, p.norm, plan, nullptr);
}

}  // namespace ADACACHE_ISA

inline bool is_general(const LayerNormModulate& p) { return is_general(p.norm, p.dtype); }

inline bool vectors_fit(const LayerNormModulate& p, int width) {
  return p.shape.channels % width == 0 && vectors_are_aligned(p.x, p.x_strides, p.dtype, width) &&
         norm_vectors_fit(p.norm, p.dtype, width);
}

inline Plan plan_of(const LayerNormModulate& p) {
  Plan plan = plan_tokens(p.shape, p.dtype, vectors_fit(p, vector_width_of(p.dtype)), is_general(p));
  Steps steps{};
  steps.x = step_of(p.x_strides, p.shape, /*along_frames=*/false, p.dtype);
  plan.steps = add_norm_steps(steps, p.norm, p.shape, /*along_frames=*/false, p.dtype);
  return plan;
}

}  // namespace adacache

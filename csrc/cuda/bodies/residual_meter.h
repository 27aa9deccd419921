// SPDX-License-Identifier: Apache-2.0
// Device body of residual_meter: the sums of two given residuals.
#pragma once

#include "../../core/residual_meter.h"
#include "elementwise.h"
#include "meter_walk.h"

namespace adacache {

inline namespace ADACACHE_ISA {

// A Source that loads r from memory and stores nothing.
template <class T, int width_>
class PairSource {
 public:
  using Element = T;
  static constexpr int width = width_;
  using Values = Packed<T, width>;
  using Loaded = Values;

  ADACACHE_HD PairSource(const ResidualMeter& p, const Steps& steps, const Walk& walk, int64_t channel)
      : r_(static_cast<const T*>(p.residual), p.residual_strides, walk.row, walk, channel, steps.x) {}

  static ADACACHE_HD bool readable(const ResidualMeter&, int64_t) { return true; }
  static ADACACHE_HD void poison(const ResidualMeter&, const Steps&, const Walk&, int64_t, int) {}
  ADACACHE_HD void load(Loaded& loaded, int64_t offset, int) const { loaded = Values::load(r_.at(offset)); }
  ADACACHE_HD void load_next(Loaded& loaded, int64_t offset, int count) const { load(loaded, offset, count); }
  ADACACHE_HD Values residual(const Loaded& loaded) const { return loaded; }
  ADACACHE_HD Values residual_at(int64_t steps, int64_t offset, int) const {
    return Values::load(r_.ahead(steps, offset));
  }
  ADACACHE_HD Values result(const Loaded& loaded, const Values&) const { return loaded; }
  ADACACHE_HD void store_result(const Values&, int64_t, int) const {}
  ADACACHE_HD void advance() { r_.advance(); }

 private:
  Cursor<const T> r_;
};

template <class T, int width>
class OldVectors {
 public:
  ADACACHE_HD OldVectors(const ResidualMeter& p, const Steps& steps, const Walk& walk, int64_t channel)
      : at_(static_cast<const T*>(p.old), p.old_strides, walk.row, walk, channel, steps.residual) {}

  static ADACACHE_HD bool readable(const ResidualMeter&, int64_t) { return true; }
  ADACACHE_HD Packed<T, width> load() const { return Packed<T, width>::load(at_.at(0)); }
  ADACACHE_HD void store(const Packed<T, width>&) const {}
  ADACACHE_HD void advance() { at_.advance(); }

 private:
  Cursor<const T> at_;
};

template <class T, int width, bool all_columns, class Block>
ADACACHE_HD void meter_body(Block& block, const ResidualMeter& p, const Plan& plan, double* partials) {
  meter_walk<PairSource<T, width>, OldVectors<T, width>, all_columns>(block, p, plan, partials);
}

}  // namespace ADACACHE_ISA

inline bool vectors_fit(const ResidualMeter& p, int width) {
  return p.shape.channels % width == 0 &&
         vectors_are_aligned(p.residual, p.residual_strides, p.dtype, width) &&
         vectors_are_aligned(p.old, p.old_strides, p.dtype, width);
}

inline Plan plan_of(const ResidualMeter& p, int threads) {
  const int wide = vector_width_of(p.dtype);
  Plan plan = plan_meter_walk(p, vectors_fit(p, wide) ? wide : 1, /*divisible=*/true, threads);
  plan.steps.x = step_of(p.residual_strides, p.shape, /*along_frames=*/true, p.dtype);
  plan.steps.residual = step_of(p.old_strides, p.shape, /*along_frames=*/true, p.dtype);
  return plan;
}

}  // namespace adacache

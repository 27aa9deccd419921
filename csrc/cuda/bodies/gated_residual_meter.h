// SPDX-License-Identifier: Apache-2.0
// Device body of gated_residual_meter: x_out = x + gate * y, r = gate * y stored over the old r, sums of
// both.
#pragma once

#include "../../core/gated_residual_meter.h"
#include "gated_residual.h"
#include "meter_walk.h"
#include "token_walk.h"

namespace adacache {

inline namespace ADACACHE_ISA {

// For a residual kept in the dtype of x.
template <class Element, int width, bool all_columns, class Block>
ADACACHE_HD void meter_body(Block& block, const GatedResidualMeter& p, const Plan& plan, double* partials) {
  using T = typename Elements<Element>::Type;
  meter_walk<GatedSource<Element, width, true>, KeptVectors<T, width>, all_columns>(block, p, plan, partials);
}

// For a residual kept in float8.
template <class Element, int vectors, class Block>
ADACACHE_HD void float8_meter_body(Block& block, const GatedResidualMeter& p, const Plan& plan,
                                   double* partials) {
  constexpr bool whole = vectors > 0;
  using T = typename Elements<Element>::Type;
  constexpr int width = vector_width<T>;
  token_walk<GatedSource<Element, width, whole>, KeptTokens<T, float8_e4m3, width, whole>, NoNorm, vectors>(
      block, p, NothingNormed{}, plan, partials);
}

}  // namespace ADACACHE_ISA

inline bool is_general(const GatedResidualMeter& p) { return gate_is_general(p); }

inline bool vectors_fit(const GatedResidualMeter& p, int width) {
  return gated_vectors_fit(p, width) && vectors_are_aligned(p.residual, width);
}

inline Steps gated_meter_steps(const GatedResidualMeter& p) {
  Steps steps = gated_steps(p, /*along_frames=*/true);
  set_cache_steps(steps, p.residual, p.shape);
  return steps;
}

inline Plan plan_of(const GatedResidualMeter& p, int threads) {
  const int wide = vector_width_of(p.dtype);
  const bool fit = vectors_fit(p, wide);
  Plan plan = p.residual.dtype == DType::float8_e4m3
                  ? plan_token_meter(p, fit, is_general(p), /*divisible=*/true)
                  : plan_meter_walk(p, fit ? wide : 1, /*divisible=*/true, threads);
  plan.steps = gated_meter_steps(p);
  return plan;
}

}  // namespace adacache

// SPDX-License-Identifier: Apache-2.0
// Device body of gated_residual_norm_meter: gated_residual_meter and the modulated layer norm of x_out.
#pragma once

#include "../../core/gated_residual_norm_meter.h"
#include "gated_residual_meter.h"
#include "layer_norm_modulate.h"

namespace adacache {

inline namespace ADACACHE_ISA {

// Stored is the type of the kept residual: that of x, or float8_e4m3.
template <class Element, class Stored, int vectors, class Block>
ADACACHE_HD void gated_residual_norm_meter_body(Block& block, const GatedResidualNormMeter& p,
                                                const Plan& plan, double* partials) {
  constexpr bool whole = vectors > 0;
  using T = typename Elements<Element>::Type;
  constexpr int width = vector_width<T>;
  token_walk<GatedSource<Element, width, whole>, KeptTokens<T, Stored, width, whole>,
             NormedTokens<Element, T, width, whole>, vectors>(block, p.meter, p.norm, plan, partials);
}

}  // namespace ADACACHE_ISA

inline bool is_general(const GatedResidualNormMeter& p) {
  return is_general(p.meter) || is_general(p.norm, p.meter.dtype);
}

inline bool vectors_fit(const GatedResidualNormMeter& p, int width) {
  return vectors_fit(p.meter, width) && norm_vectors_fit(p.norm, p.meter.dtype, width);
}

inline Plan plan_of(const GatedResidualNormMeter& p) {
  const GatedResidualMeter& meter = p.meter;
  Plan plan = plan_token_meter(meter, vectors_fit(p, vector_width_of(meter.dtype)), is_general(p),
                               /*divisible=*/true);
  plan.steps =
      add_norm_steps(gated_meter_steps(meter), p.norm, meter.shape, /*along_frames=*/true, meter.dtype);
  return plan;
}

}  // namespace adacache

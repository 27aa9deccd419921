// SPDX-License-Identifier: Apache-2.0
// Device body of gated_residual_norm and gated_residual_norm_float8: x_out = x + gate * y and the modulated
// norm of x_out.
#pragma once

#include "../../core/gated_residual_norm.h"
#include "gated_residual.h"
#include "layer_norm_modulate.h"

namespace adacache {

inline namespace ADACACHE_ISA {

// Stored: the type of the norm, that of x or float8_e4m3.
template <class Element, int vectors, class Stored = typename Elements<Element>::Type, class Block>
ADACACHE_HD void gated_residual_norm_body(Block& block, const GatedResidualNorm& p, const Plan& plan) {
  constexpr bool whole = vectors > 0;
  constexpr int width = vector_width<Element>;
  token_walk<GatedSource<Element, width, whole>, NothingKept, NormedTokens<Element, Stored, width, whole>,
             vectors>(block, p.residual, p.norm, plan, nullptr);
}

}  // namespace ADACACHE_ISA

inline bool is_general(const GatedResidualNorm& p) {
  return is_general(p.residual) || is_general(p.norm, p.residual.dtype);
}

inline bool vectors_fit(const GatedResidualNorm& p, int width) {
  return vectors_fit(p.residual, width) && norm_vectors_fit(p.norm, p.residual.dtype, width);
}

inline Plan plan_of(const GatedResidualNorm& p) {
  const GatedResidual& residual = p.residual;
  Plan plan = plan_tokens(residual.shape, residual.dtype, vectors_fit(p, vector_width_of(residual.dtype)),
                          is_general(p));
  plan.steps = add_norm_steps(gated_steps(residual, /*along_frames=*/false), p.norm, residual.shape,
                              /*along_frames=*/false, residual.dtype);
  return plan;
}

}  // namespace adacache

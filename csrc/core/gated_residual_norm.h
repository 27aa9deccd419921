// SPDX-License-Identifier: Apache-2.0
// Parameters of gated_residual_norm and gated_residual_norm_float8: x_out = x + gate * y and the modulated
// norm of x_out.
#pragma once

#include "gated_residual.h"

namespace adacache {

struct GatedResidualNorm {
  GatedResidual residual;
  Norm norm;
};

}  // namespace adacache

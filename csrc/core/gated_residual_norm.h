// x_out = x + gate * y and the layer norm of x_out, modulated, in one pass: parameters and device body.
#pragma once

#include "gated_residual.h"
#include "layer_norm_modulate.h"

namespace adacache {

struct GatedResidualNorm {
  GatedResidual residual;
  Norm norm;
};

}  // namespace adacache

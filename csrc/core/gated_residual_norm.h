// x_out = x + gate * y and the layer norm of x_out, modulated, in one pass: parameters.
#pragma once

#include "gated_residual.h"

namespace adacache {

struct GatedResidualNorm {
  GatedResidual residual;
  Norm norm;
};

}  // namespace adacache

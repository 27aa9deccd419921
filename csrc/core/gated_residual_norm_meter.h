// gated_residual_meter and the layer norm of x_out, modulated, in one pass: parameters.
#pragma once

#include "gated_residual_meter.h"

namespace adacache {

struct GatedResidualNormMeter {
  GatedResidualMeter meter;
  Norm norm;
};

}  // namespace adacache

// gated_residual_meter and the layer norm of x_out, modulated, in one pass: parameters and device body.
#pragma once

#include "gated_residual_meter.h"
#include "layer_norm_modulate.h"

namespace adacache {

struct GatedResidualNormMeter {
  GatedResidualMeter meter;
  Norm norm;
};

}  // namespace adacache

// SPDX-License-Identifier: Apache-2.0
// Parameters of gated_residual_norm_meter: gated_residual_meter and the modulated layer norm of x_out.
#pragma once

#include "gated_residual_meter.h"

namespace adacache {

struct GatedResidualNormMeter {
  GatedResidualMeter meter;
  Norm norm;
};

}  // namespace adacache

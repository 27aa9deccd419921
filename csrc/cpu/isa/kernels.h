// SPDX-License-Identifier: Apache-2.0
// All CPU kernels of one instruction set. Included by one file per instruction set, which defines
// ADACACHE_ISA and ADACACHE_KERNELS (the name of the table) and is compiled with the options of that
// instruction set.
#include "extrapolate_residual.h"
#include "extrapolate_residual_meter.h"
#include "fused_qk_norm_rope.h"
#include "gated_residual.h"
#include "gated_residual_meter.h"
#include "layer_norm_modulate.h"
#include "residual_meter.h"
#include "reuse_residual.h"
#include "stack_residual_meter.h"
#include "temporal_attention.h"

namespace adacache::cpu {

const Kernels ADACACHE_KERNELS = {
    ADACACHE_KERNELS_NAME, gated_residual,     gated_residual_meter, stack_residual_meter,
    residual_meter,        reuse_residual,     extrapolate_residual, extrapolate_residual_meter,
    layer_norm_modulate,   fused_qk_norm_rope, temporal_attention};

}  // namespace adacache::cpu

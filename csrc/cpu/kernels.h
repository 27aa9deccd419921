// SPDX-License-Identifier: Apache-2.0
// The table of CPU kernels, one per instruction set, and its selection at run time.
#pragma once

#include "../core/extrapolate_residual.h"
#include "../core/extrapolate_residual_meter.h"
#include "../core/gated_residual.h"
#include "../core/gated_residual_meter.h"
#include "../core/layer_norm_modulate.h"
#include "../core/residual_meter.h"
#include "../core/reuse_residual.h"
#include "../core/stack_residual_meter.h"
#include "attention.h"

namespace adacache::cpu {

// Tokens [first, last) of one batch row.
struct TokenUnit {
  int64_t row, first, last;
  bool stream_out, stream_norm;  // use streaming stores for these outputs
  float* scratch;                // [scratch_rows, padded_channels]
};

// All frames of places [first_place, end_place) of one batch row, few enough that earlier frames are still
// cached.
struct MeterUnit {
  int64_t row, first_place, end_place;
  bool stream_out, stream_norm;
  float* scratch;
  void* waiting;    // buffer for r that is not kept in its dtype: waiting_frames frames, padded channels
  double* partial;  // [sum_columns], the sums of the unit
};

// Values, factor and offset of a norm, and the gate of a token.
constexpr int scratch_rows = 4;

// Each function processes one unit. norm is null for ops without a norm.
struct Kernels {
  const char* name;
  void (*gated_residual)(const GatedResidual&, const Norm* norm, const TokenUnit&);
  void (*gated_residual_meter)(const GatedResidualMeter&, const Norm* norm, const MeterUnit&);
  void (*stack_residual_meter)(const StackResidualMeter&, const MeterUnit&);
  void (*residual_meter)(const ResidualMeter&, const MeterUnit&);
  void (*reuse_residual)(const ReuseResidual&, bool reuse, const TokenUnit&);
  void (*extrapolate_residual)(const ExtrapolateResidual&, const float* coefficients, const TokenUnit&);
  void (*extrapolate_residual_meter)(const ExtrapolateResidualMeter&, const MeterUnit&);
  void (*layer_norm_modulate)(const LayerNormModulate&, const TokenUnit&);
  void (*fused_qk_norm_rope)(const FusedQkNormRope&, const AttentionUnit&);
  void (*temporal_attention)(const TemporalAttention&, const AttentionUnit&);
};

extern const Kernels baseline_kernels;
#if defined(ADACACHE_X86_ISAS)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

// The widest kernels that this processor supports. ADACACHE_CPU_ISA=baseline|avx2|avx512 sets an upper limit.
const Kernels& kernels();

inline namespace ADACACHE_ISA {

// Channels of a token in scratch memory, a multiple of 16.
inline int64_t padded_channels(int64_t channels) { return (channels + 15) / 16 * 16; }

// Frames of r that motion reads: this one and earlier ones up to the longest stride.
inline int64_t waiting_frames(const MotionStrides& motion) {
  int64_t frames = 1;
  for (int i = 0; i < motion.count; ++i)
    if (motion.stride[i] >= frames) frames = motion.stride[i] + 1;
  return frames;
}

}  // namespace ADACACHE_ISA
}  // namespace adacache::cpu

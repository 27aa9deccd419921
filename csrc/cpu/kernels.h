// The CPU kernels and the choice among their copies, one per instruction set.
#pragma once

#include "../core/extrapolate_residual.h"
#include "../core/gated_residual.h"
#include "../core/gated_residual_meter.h"
#include "../core/layer_norm_modulate.h"
#include "../core/residual_meter.h"
#include "../core/reuse_residual.h"
#include "../core/stack_residual_meter.h"
#include "attention.h"

namespace adacache::cpu {

// A unit of work on single tokens: [first, last) of one row of the batch.
struct TokenUnit {
  int64_t row, first, last;
  bool stream_out, stream_norm;  // whether these outputs are written past the caches
  float* norm_scratch;           // norm_scratch_rows of padded_channels
};

// A unit of a meter: all frames of some neighbouring places of one row, so that a frame meets the earlier
// ones in the cache.
struct MeterUnit {
  int64_t row, first_place, end_place;
  bool stream_out, stream_norm;
  float* norm_scratch;
  void* waiting;    // scratch memory for a float8 cache: waiting_frames of r, each token padded
  double* partial;  // the unit's sums, one per column
};

// A token's values, and what they are multiplied by and what is added.
constexpr int norm_scratch_rows = 3;

// Each processes one unit. norm is null for the ops without one.
struct Kernels {
  const char* name;
  void (*gated_residual)(const GatedResidual&, const Norm* norm, const TokenUnit&);
  void (*gated_residual_meter)(const GatedResidualMeter&, const Norm* norm, const MeterUnit&);
  void (*stack_residual_meter)(const StackResidualMeter&, const MeterUnit&);
  void (*residual_meter)(const ResidualMeter&, const MeterUnit&);
  void (*reuse_residual)(const ReuseResidual&, bool reuse, const TokenUnit&);
  void (*extrapolate_residual)(const ExtrapolateResidual&, const float* coefficients, const TokenUnit&);
  void (*layer_norm_modulate)(const LayerNormModulate&, const TokenUnit&);
  void (*fused_qk_norm_rope)(const FusedQkNormRope&, const AttentionUnit&);
  void (*temporal_attention)(const TemporalAttention&, const AttentionUnit&);
};

extern const Kernels baseline_kernels;
#if defined(ADACACHE_X86_ISAS)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

// The best copy for this processor. ADACACHE_CPU_ISA=baseline|avx2|avx512 in the environment asks for another
// one.
const Kernels& kernels();

inline namespace ADACACHE_ISA {

// Channels of a token in scratch memory: a whole number of sixteens.
inline int64_t padded_channels(int64_t channels) { return (channels + 15) / 16 * 16; }

// Frames of r that the motion looks at: this one and those back to the longest stride.
inline int64_t waiting_frames(const MotionStrides& motion) {
  int64_t frames = 1;
  for (int i = 0; i < motion.count; ++i)
    if (motion.stride[i] >= frames) frames = motion.stride[i] + 1;
  return frames;
}

}  // namespace ADACACHE_ISA
}  // namespace adacache::cpu

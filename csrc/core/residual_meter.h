// The sums between two residuals that the caller holds: parameters and device body.
#pragma once

#include "gated_residual_meter.h"

namespace adacache {

struct ResidualMeter {
  const void* residual;
  const void* old;
  TokenStrides residual_strides, old_strides;
  TokenShape shape;
  MotionStrides motion;
  bool all_columns;
  DType dtype;
};

inline namespace ADACACHE_ISA {

// Threads and partials as in gated_residual_meter_body.
template <class T, int width, bool all_columns, class Block>
ADACACHE_HD void residual_meter_body(Block& block, const ResidualMeter& p, double* partials) {
  using Values = Packed<T, width>;
  const int64_t vectors = p.shape.channels / width;
  const int64_t blocks_per_row = meter_blocks_per_row(p.shape, width, block.threads());
  const int64_t row = block.index() / blocks_per_row;
  const int64_t block_of_row = block.index() % blocks_per_row;
  const int64_t item = block_of_row * block.threads() + block.thread();
  const int64_t frames = p.shape.frames;
  ThreadSums<all_columns, Block> sums(block, p.motion, frames);

  if (item < p.shape.places * vectors) {
    const int64_t place = item / vectors;
    const int64_t channel = item % vectors * width;
    const T* residual = static_cast<const T*>(p.residual) + row * p.residual_strides.batch +
                        place * p.residual_strides.token + channel;
    const T* old =
        static_cast<const T*>(p.old) + row * p.old_strides.batch + place * p.old_strides.token + channel;
    const int64_t residual_frame = p.residual_strides.token * p.shape.places;
    Values next_r = Values::load(residual);
    Values next_old = Values::load(old);
    Values previous{};
    for (int64_t frame = 0; frame < frames; ++frame) {
      const Values r = next_r;
      const Values current_old = next_old;
      if (frame + 1 < frames) {
        old += p.old_strides.token * p.shape.places;
        next_r = Values::load(residual + residual_frame);
        next_old = Values::load(old);
      }
      for (int c = 0; c < width; ++c) sums.measure(r.get(c), current_old.get(c));
      sums.finish_frame(frame);
      sums.template gather_motion<width>(frame, r, [&](int stride) {
        return stride == 1 ? previous : Values::load(residual - stride * residual_frame);
      });
      previous = r;
      residual += residual_frame;
    }
  }
  sums.finish(partials + row * sum_columns(p.motion) * blocks_per_row + block_of_row, blocks_per_row);
}

}  // namespace ADACACHE_ISA

inline bool vectors_fit(const ResidualMeter& p, int width) {
  return p.shape.channels % width == 0 &&
         vectors_are_aligned(p.residual, width, p.residual_strides.batch, p.residual_strides.token) &&
         vectors_are_aligned(p.old, width, p.old_strides.batch, p.old_strides.token);
}

}  // namespace adacache

// x_out = x + gate * y, r = gate * y written over the old r, and the sums between the two: parameters and
// device body.
#pragma once

#include "block.h"
#include "packed.h"
#include "tokens.h"

namespace adacache {

struct GatedResidualMeter {
  const void* x;
  const void* y;
  void* out;  // may be x, if x_rows picks no rows
  TokenStrides x_strides, y_strides, out_strides;
  RowIndex x_rows;
  Modulator gate;
  Cache residual;
  TokenShape shape;
  MotionStrides motion;
  bool all_columns;
  DType dtype;
};

// Places and channel vectors of a row are dealt to threads, which walk over all frames: r of two frames meets
// in one thread, and motion costs no pass over memory.
ADACACHE_HD int64_t meter_blocks_per_row(const TokenShape& shape, int width, int threads) {
  return (shape.places * (shape.channels / width) + threads - 1) / threads;
}

inline namespace ADACACHE_ISA {

// partials: [rows, columns, blocks_per_row]; one block writes one entry of each column that is measured.
template <class T, int width, bool all_columns, class Block>
ADACACHE_HD void gated_residual_meter_body(Block& block, const GatedResidualMeter& p, double* partials) {
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
    const T* x = static_cast<const T*>(p.x) + row * p.x_strides.batch + place * p.x_strides.token + channel;
    const T* y = static_cast<const T*>(p.y) + row * p.y_strides.batch + place * p.y_strides.token + channel;
    const T* gate = static_cast<const T*>(p.gate.data) + row * p.gate.batch + place * p.gate.place + channel;
    T* residual = static_cast<T*>(p.residual.data) + row * p.residual.strides.batch +
                  place * p.residual.strides.token + channel;
    T* out = static_cast<T*>(p.out) + row * p.out_strides.batch + place * p.out_strides.token + channel;
    const int64_t residual_frame = p.residual.strides.token * p.shape.places;

    Values next_x = Values::load(x);
    Values next_y = Values::load(y);
    Values next_old = Values::load(residual);
    Values next_gate = Values::load(gate);
    Values previous{};
    for (int64_t frame = 0; frame < frames; ++frame) {
      const Values current_x = next_x;
      const Values current_y = next_y;
      const Values old = next_old;
      const Values current_gate = next_gate;
      if (frame + 1 < frames) {
        // On their way while this frame is computed.
        x += p.x_strides.token * p.shape.places;
        y += p.y_strides.token * p.shape.places;
        next_x = Values::load(x);
        next_y = Values::load(y);
        next_old = Values::load(residual + residual_frame);
        if (p.gate.frame != 0) {
          gate += p.gate.frame;
          next_gate = Values::load(gate);
        }
      }
      Values r;
      Values sum;
      for (int c = 0; c < width; ++c) {
        r.set(c, multiply(current_gate.get(c), current_y.get(c)));
        sum.set(c, add(current_x.get(c), r.get(c)));
        sums.measure(r.get(c), old.get(c));
      }
      r.store(residual);
      sum.store(out);
      sums.finish_frame(frame);
      sums.template gather_motion<width>(frame, r, [&](int stride) {
        return stride == 1 ? previous : Values::load(residual - stride * residual_frame);
      });
      previous = r;
      residual += residual_frame;
      out += p.out_strides.token * p.shape.places;
    }
  }
  sums.finish(partials + row * sum_columns(p.motion) * blocks_per_row + block_of_row, blocks_per_row);
}

}  // namespace ADACACHE_ISA

inline bool vectors_fit(const GatedResidualMeter& p, int width) {
  return p.shape.channels % width == 0 &&
         vectors_are_aligned(p.x, width, p.x_strides.batch, p.x_strides.token) &&
         vectors_are_aligned(p.y, width, p.y_strides.batch, p.y_strides.token) &&
         vectors_are_aligned(p.gate.data, width, p.gate.batch, p.gate.frame, p.gate.place) &&
         vectors_are_aligned(p.residual.data, width, p.residual.strides.batch, p.residual.strides.token) &&
         vectors_are_aligned(p.out, width, p.out_strides.batch, p.out_strides.token);
}

}  // namespace adacache

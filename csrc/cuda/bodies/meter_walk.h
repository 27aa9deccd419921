// SPDX-License-Identifier: Apache-2.0
// The loop of the elementwise meters: a thread processes one channel vector of one place over all frames of a
// segment, so that it has r of several frames for motion.
#pragma once

#include "block.h"

namespace adacache {

// Of the measured residual, if it is not that of x.
template <class P>
DType residual_dtype_of(const P& p) {
  if constexpr (requires { P::residual_dtype; })
    return P::residual_dtype;
  else
    return p.dtype;
}

template <class P>
Plan plan_meter_walk(const P& p, int width, bool divisible, int threads) {
  Plan plan;
  plan.threads = threads;
  plan.width = width;
  const int vector_bytes = static_cast<int>(width * bytes_of(residual_dtype_of(p)));
  plan.history = history_that_fits(p.motion, plan.threads, vector_bytes);
  const int64_t items = p.shape.places * (p.shape.channels / width);
  divide_frames(plan, p.shape.rows, p.shape.frames, (items + plan.threads - 1) / plan.threads, divisible);
  return plan;
}

template <class P>
int64_t meter_walk_shared_bytes(const P& p, const Plan& plan) {
  const int vector_bytes = static_cast<int>(plan.width * bytes_of(residual_dtype_of(p)));
  return shared_layout(plan.threads, plan.history, vector_bytes, p.motion).bytes;
}

inline namespace ADACACHE_ISA {

// partials: [rows, columns, blocks_per_row]; a block writes one entry per measured column.
// Source computes r and stores the result; Kept loads the old r and stores the new one. A Source with
// compared() measures r against that instead of the old r.
template <class Source, class Kept, bool all_columns, class P, class Block>
ADACACHE_HD void meter_walk(Block& block, const P& p, const Plan& plan, double* partials) {
  constexpr int width = Source::width;
  using Values = typename Source::Values;
  const Quotient in_row = divide(block.index(), plan.blocks_per_row);
  const Quotient in_segment = divide(in_row.remainder, plan.blocks_per_segment);
  const int64_t row = in_row.quotient;
  const int frames = static_cast<int>(p.shape.frames);
  const int first = static_cast<int>(in_segment.quotient) * plan.per_segment;
  const int rest = frames - first;
  const Quotient item =
      divide(in_segment.remainder * block.threads() + block.thread(), p.shape.channels / width);
  Walk walk{row, first, item.quotient, p.shape.places, rest < plan.per_segment ? rest : plan.per_segment};
  const int64_t channel = item.remainder * width;
  const bool readable = Source::readable(p, row) && Kept::readable(p, row);

  ThreadSums<all_columns, Values, width, 1, Block> sums(block, p.motion, plan.history, frames);
  if (!readable) {
    sums.poison();
    if (walk.place < walk.places) Source::poison(p, plan.steps, walk, channel, width);
  } else if (walk.place < walk.places) {
    Source source(p, plan.steps, walk, channel);
    Kept kept(p, plan.steps, walk, channel);
    for (int before = first < plan.history ? first : plan.history; before > 0; --before) {
      sums.remember(0, source.residual_at(-before, 0, width));
      sums.next_frame_of_history();
    }
    typename Source::Loaded loaded{};
    source.load(loaded, 0, width);
    Values old = kept.load();
    for (int i = 0; i < walk.count; ++i) {
      const Values r = source.residual(loaded);
      if constexpr (requires { source.compared(loaded); }) {
        const Values compared = source.compared(loaded);
        sums.measure(r, [&](int c) { return compared.get(c); }, width);
      } else {
        sums.measure(r, [&](int c) { return old.get(c); }, width);
      }
      source.store_result(source.result(loaded, r), 0, width);
      kept.store(r);
      source.advance();
      kept.advance();
      if (i + 1 < walk.count) {
        // Prefetch into registers that are free now.
        source.load_next(loaded, 0, width);
        old = kept.load();
      }
      sums.measure_motion(first + i, 0, r,
                          [&](int stride) { return source.residual_at(stride - 1, 0, width); });
      sums.finish_frame(first + i);
    }
  }
  sums.finish(partials + row * sum_columns(p.motion) * plan.blocks_per_row + in_row.remainder,
              plan.blocks_per_row);
}

// A kept residual in the dtype of x, at the tokens of a walk.
template <class T, int width>
class KeptVectors {
 public:
  template <class P>
  ADACACHE_HD KeptVectors(const P& p, const Steps& steps, const Walk& walk, int64_t channel)
      : at_(static_cast<T*>(p.residual.data), p.residual.strides, row_of(p.residual.rows, walk.row), walk,
            channel, steps.residual) {}

  template <class P>
  static ADACACHE_HD bool readable(const P& p, int64_t row) {
    return row_of(p.residual.rows, row) >= 0;
  }

  ADACACHE_HD Packed<T, width> load() const { return Packed<T, width>::load(at_.at(0)); }
  ADACACHE_HD void store(const Packed<T, width>& r) const { r.store(at_.at(0)); }
  ADACACHE_HD void advance() { at_.advance(); }

 private:
  Cursor<T> at_;
};

}  // namespace ADACACHE_ISA
}  // namespace adacache

// SPDX-License-Identifier: Apache-2.0
// Device body of gated_residual: x_out = x + gate * y.
#pragma once

#include "../../core/gated_residual.h"
#include "elementwise.h"

namespace adacache {

inline namespace ADACACHE_ISA {

// r = gate * y and x + r, rounded like two PyTorch operations: after the product and after the sum.
template <class T, class G, int width>
ADACACHE_HD Packed<T, width> gated(const Packed<G, width>& gate, const Packed<T, width>& y) {
  float r[width];
  ADACACHE_UNROLL
  for (int c = 0; c < width; ++c) r[c] = multiply(gate.get(c), y.get(c));
  return Packed<T, width>::of(r);
}

template <class T, int width>
ADACACHE_HD Packed<T, width> added(const Packed<T, width>& x, const Packed<T, width>& r) {
  float out[width];
  ADACACHE_UNROLL
  for (int c = 0; c < width; ++c) out[c] = add(x.get(c), r.get(c));
  return Packed<T, width>::of(out);
}

// x + gate * y, rounded once.
template <class T, int width>
ADACACHE_HD Packed<T, width> added_once(const Packed<T, width>& x, const Packed<float, width>& gate,
                                        const Packed<T, width>& y) {
  float out[width];
  ADACACHE_UNROLL
  for (int c = 0; c < width; ++c) out[c] = add(x.get(c), multiply(gate.get(c), y.get(c)));
  return Packed<T, width>::of(out);
}

template <class Element, int width, class Block>
ADACACHE_HD void gated_residual_body(Block& block, const GatedResidual& p, const Plan& plan) {
  using T = typename Elements<Element>::Type;
  using Values = Packed<T, width>;
  struct Loaded {
    Values x, y;
    Packed<typename Elements<Element>::Modulator, width> gate;
  };
  visit_elements<Loaded, width>(
      block, plan, p.shape.frames * p.shape.places, p.shape.channels,
      [&](int64_t row, int64_t token, int64_t channel) {
        Loaded loaded{};
        const int64_t x_row = row_of(p.x_rows, row);
        if (x_row >= 0) loaded.x = Values::load(token_at<T>(p.x, p.x_strides, x_row, token, channel));
        loaded.y = Values::load(token_at<T>(p.y, p.y_strides, row, token, channel));
        if (p.gate.data != nullptr) {
          int64_t gate = row * p.gate.batch + channel;
          if (p.gate.frame != 0 || p.gate.place != 0) {
            const Quotient at = divide(token, p.shape.places);
            gate += at.quotient * p.gate.frame + at.remainder * p.gate.place;
          }
          loaded.gate = load_modulator<Element, true, width>(
              p.gate.data, p.gate.dtype, gate, p.gate.table ? p.gate.table + channel : nullptr, width);
        }
        return loaded;
      },
      [&](int64_t row, int64_t token, int64_t channel, const Loaded& loaded) {
        const Values r = p.gate.data != nullptr ? gated(loaded.gate, loaded.y) : loaded.y;
        // Reporting an out-of-range row would synchronize; its output is NaN.
        const bool known = row_of(p.x_rows, row) >= 0;
        Values out = known ? added(loaded.x, r) : all_nan<Values, width>();
        if constexpr (Elements<Element>::general)
          if (known && p.gate.data != nullptr && p.rounding == Rounding::float32)
            out = added_once(loaded.x, loaded.gate, loaded.y);
        out.store(token_at<T>(p.out, p.out_strides, row, token, channel));
      });
}

// Computes r and x_out at the tokens of a walk. P is GatedResidual or GatedResidualMeter.
template <class Element, int width_, bool whole>
class GatedSource {
 public:
  using T = typename Elements<Element>::Type;
  static constexpr int width = width_;
  using Values = Packed<T, width>;
  struct Loaded {
    Values x, y;
    Packed<typename Elements<Element>::Modulator, width> gate;
  };
  // Whether storing the result overwrites an input of r.
  static constexpr bool result_covers_input = false;

  template <class P>
  ADACACHE_HD GatedSource(const P& p, const Steps& steps, const Walk& walk, int64_t channel)
      : x_(static_cast<const T*>(p.x), p.x_strides, row_of(p.x_rows, walk.row), walk, channel, steps.x),
        y_(static_cast<const T*>(p.y), p.y_strides, walk.row, walk, channel, steps.y),
        out_(static_cast<T*>(p.out), p.out_strides, walk.row, walk, channel, steps.out),
        gate_(p.gate, walk, channel, steps.gate),
        has_gate_(p.gate.data != nullptr),
        gate_moves_(p.gate.data != nullptr && steps.gate != 0),
        rounds_once_(p.gate.data != nullptr && p.rounding == Rounding::float32) {}

  template <class P>
  static ADACACHE_HD bool readable(const P& p, int64_t row) {
    return row_of(p.x_rows, row) >= 0;
  }

  // Stores NaN to the outputs of the walk.
  template <class P>
  static ADACACHE_HD void poison(const P& p, const Steps& steps, const Walk& walk, int64_t channel,
                                 int count) {
    Cursor<T> out(static_cast<T*>(p.out), p.out_strides, walk.row, walk, channel, steps.out);
    for (int i = 0; i < walk.count; ++i, out.advance())
      store_vector<whole>(all_nan<Values, width>(), out.at(0), count);
  }

  ADACACHE_HD void load(Loaded& loaded, int64_t offset, int count) const {
    load_next(loaded, offset, count);
    if (has_gate_ && !gate_moves_) loaded.gate = gate_.template load<whole, width>(0, offset, count);
  }
  // Does not reload what is constant along the walk.
  ADACACHE_HD void load_next(Loaded& loaded, int64_t offset, int count) const {
    loaded.x = load_vector<whole, width>(x_.at(offset), count);
    loaded.y = load_vector<whole, width>(y_.at(offset), count);
    if (gate_moves_) loaded.gate = gate_.template load<whole, width>(0, offset, count);
  }

  ADACACHE_HD Values residual(const Loaded& loaded) const {
    return has_gate_ ? gated(loaded.gate, loaded.y) : loaded.y;
  }
  // Recomputes r of a token `steps` away, from inputs that no block overwrites.
  ADACACHE_HD Values residual_at(int64_t steps, int64_t offset, int count) const {
    const Values y = load_vector<whole, width>(y_.ahead(steps, offset), count);
    return has_gate_ ? gated(gate_.template load<whole, width>(steps, offset, count), y) : y;
  }

  ADACACHE_HD Values result(const Loaded& loaded, const Values& r) const {
    if constexpr (Elements<Element>::general && !std::is_same_v<T, float>)
      if (rounds_once_) return added_once(loaded.x, loaded.gate, loaded.y);
    return added(loaded.x, r);
  }
  // Loads the result that store_result() stored.
  ADACACHE_HD Values result_again(int64_t offset, int count) const {
    return load_vector<whole, width>(static_cast<const T*>(out_.at(offset)), count);
  }
  ADACACHE_HD void store_result(const Values& result, int64_t offset, int count) const {
    store_vector<whole>(result, out_.at(offset), count);
  }

  ADACACHE_HD void advance() {
    x_.advance();
    y_.advance();
    out_.advance();
    gate_.advance();
  }

 private:
  Cursor<const T> x_, y_;
  Cursor<T> out_;
  ModulatorCursor<Element> gate_;
  bool has_gate_, gate_moves_, rounds_once_;
};

}  // namespace ADACACHE_ISA

// P is GatedResidual or GatedResidualMeter. In float32, the sum is the only rounding in either mode.
template <class P>
bool gate_is_general(const P& p) {
  return is_general(p.gate, p.dtype) ||
         (p.gate.data != nullptr && p.rounding == Rounding::float32 && p.dtype != DType::float32);
}

inline bool is_general(const GatedResidual& p) { return gate_is_general(p); }

template <class P>
Steps gated_steps(const P& p, bool along_frames) {
  Steps steps{};
  steps.x = step_of(p.x_strides, p.shape, along_frames, p.dtype);
  steps.y = step_of(p.y_strides, p.shape, along_frames, p.dtype);
  steps.out = step_of(p.out_strides, p.shape, along_frames, p.dtype);
  steps.gate = step_of(p.gate, along_frames);
  return steps;
}

template <class P>
bool gated_vectors_fit(const P& p, int width) {
  return p.shape.channels % width == 0 && vectors_are_aligned(p.x, p.x_strides, p.dtype, width) &&
         vectors_are_aligned(p.y, p.y_strides, p.dtype, width) && vectors_are_aligned(p.gate, width) &&
         vectors_are_aligned(p.out, p.out_strides, p.dtype, width);
}

inline bool vectors_fit(const GatedResidual& p, int width) { return gated_vectors_fit(p, width); }

inline Plan plan_of(const GatedResidual& p, int threads) {
  const int wide = vector_width_of(p.dtype);
  return plan_elementwise(p.shape.rows, p.shape.frames * p.shape.places, p.shape.channels,
                          vectors_fit(p, wide) ? wide : 1, threads);
}

}  // namespace adacache

// SPDX-License-Identifier: Apache-2.0
// Test cases of the meters: the tensors of x + gate * y or of a stack's residual, the expected results, and
// the comparison.
#pragma once

#include <algorithm>

#include "../../csrc/cuda/bodies/gated_residual_meter.h"
#include "../../csrc/cuda/bodies/stack_residual_meter.h"
#include "host_tensors.h"

namespace adacache::host {

template <class T>
double element_sum(double a, double b) {
  return nearest<T>(static_cast<float>(a + b));
}

// r(row of the batch, n, c) is the expected residual in row `actual.rows.of(row)` of the cache. Rows with
// known() false are unchanged.
template <class Stored, class Known, class R>
void expect_cache(const HostCache<Stored>& actual, const HostCache<Stored>& before, int64_t rows,
                  const Known& known, const R& r) {
  HostCache<Stored> want = before;
  for (int64_t b = 0; b < rows; ++b) {
    if (!known(b)) continue;
    const int64_t row = actual.rows.of(b);
    for (int64_t n = 0; n < want.stored.tokens; ++n) {
      const int64_t channels = want.stored.channels;
      if (channels == 0) continue;
      if constexpr (HostCache<Stored>::scaled) {
        const Quantised quantised(channels, [&](int64_t c) { return r(b, n, c); });
        from_float(quantised.scale, want.scale.memory[want.scale.at(row, n, 0)]);
        for (int64_t c = 0; c < channels; ++c)
          from_float(static_cast<float>(quantised(r(b, n, c))),
                     want.stored.memory[want.stored.at(row, n, c)]);
      } else {
        for (int64_t c = 0; c < channels; ++c)
          from_float(static_cast<float>(r(b, n, c)), want.stored.memory[want.stored.at(row, n, c)]);
      }
    }
  }
  expect_tensor("residual", actual.stored, before.stored, want.stored);
  expect_tensor("residual_scale", actual.scale, before.scale, want.scale);
}

// Adds, in some cases, a NaN, an infinity, or a token of zeros and of values too small for a float8 scale.
template <class T>
void add_oddities(HostTensor<T>& tensor) {
  if (tensor.rows * tensor.tokens * tensor.channels == 0) return;
  const int64_t row = pick(0, tensor.rows - 1), token = pick(0, tensor.tokens - 1);
  switch (pick(0, 9)) {
    case 0:
      return from_float(static_cast<float>(nan),
                        tensor.memory[tensor.at(row, token, pick(0, tensor.channels - 1))]);
    case 1:
      return from_float(std::numeric_limits<float>::infinity(),
                        tensor.memory[tensor.at(row, token, pick(0, tensor.channels - 1))]);
    case 2:
    case 3:
      for (int64_t c = 0; c < tensor.channels; ++c)
        from_float(once_in(2) ? 0.0f : 1e-35f, tensor.memory[tensor.at(row, token, c)]);
  }
}

// x, y, gate and a cached residual of type Stored.
template <class Element, class Stored>
struct GatedScene {
  using T = typename Elements<Element>::Type;
  MeterCase k;
  HostRows x_rows;
  HostTensor<T> x, y, out;
  HostModulator<Element> gate;
  Rounding rounding = random_rounding<Element>();
  HostCache<Stored> cache;
  bool in_place;
  HostTensor<T> x_before, out_before;
  HostCache<Stored> cache_before;

  explicit GatedScene(const TokenShape& shape)
      : k(shape),
        x_rows(random_rows(shape.rows, false)),
        x(x_rows.total, tokens(), shape.channels, random_place()),
        y(shape.rows, tokens(), shape.channels, random_place()),
        out(shape.rows, tokens(), shape.channels, random_place()),
        gate(random_modulator<Element>(shape, random_place())),
        cache(random_rows(shape.rows, true), tokens(), shape.channels, random_place()),
        in_place(x_rows.index.empty() && once_in(3)),
        x_before(x),
        out_before(out),
        cache_before(cache) {
    out_before.fill(static_cast<float>(nan));
    out = out_before;
    add_oddities(y);
  }
  int64_t tokens() const { return k.shape.frames * k.shape.places; }

  GatedResidualMeter parameters() {
    GatedResidualMeter p{};
    p.x = x.data();
    p.y = y.data();
    p.out = in_place ? x.data() : out.data();
    p.x_strides = x.strides;
    p.y_strides = y.strides;
    p.out_strides = in_place ? x.strides : out.strides;
    p.x_rows = x_rows.get();
    p.gate = gate.get();
    p.rounding = rounding;
    p.residual = cache.get(dtype_of<Stored>);
    p.shape = k.shape;
    p.motion = k.motion;
    p.all_columns = k.all_columns;
    p.dtype = dtype_of<T>;
    return p;
  }
  void reset() {
    x.memory = x_before.memory;
    out.memory = out_before.memory;
    cache.stored.memory = cache_before.stored.memory;
    cache.scale.memory = cache_before.scale.memory;
  }

  bool known(int64_t b) const { return x_rows.of(b) >= 0 && cache.rows.of(b) >= 0; }
  double r(int64_t b, int64_t n, int64_t c) const {
    return nearest<T>(product_of(gate, y(b, n, c), b, n, c));
  }
  double x_out(int64_t b, int64_t n, int64_t c) const {
    if (!known(b)) return nan;
    const double added = rounding == Rounding::eager ? r(b, n, c) : product_of(gate, y(b, n, c), b, n, c);
    return element_sum<T>(x_before(x_rows.of(b), n, c), added);
  }
  HostTensor<T>& result() { return in_place ? x : out; }

  void check(const Sums& sums) {
    expect_tensor(in_place ? "x" : "out", result(), in_place ? x_before : out_before,
                  [&](int64_t b, int64_t n, int64_t c) { return x_out(b, n, c); });
    const auto is_known = [&](int64_t b) { return known(b); };
    const auto residual = [&](int64_t b, int64_t n, int64_t c) { return r(b, n, c); };
    expect_cache(cache, cache_before, k.shape.rows, is_known, residual);
    const auto old = [&](int64_t b, int64_t n, int64_t c) { return cache_before(cache.rows.of(b), n, c); };
    expect_sums(
        sums,
        expected_sums(k.shape, k.motion, k.all_columns, k.videos, k.video_of_row, is_known, residual, old),
        k.motion);
  }
};

// x_out, x_in, an optional destination of x_out, and a cached residual of type Stored.
template <class T, class Stored>
struct StackScene {
  MeterCase k;
  HostRows rows;
  HostTensor<T> x_out, x_in, out;
  HostCache<Stored> cache;
  enum class Put { nowhere, out, x_in } put;
  HostTensor<T> x_in_before, out_before;
  HostCache<Stored> cache_before;

  explicit StackScene(const TokenShape& shape)
      : k(shape),
        rows(random_rows(shape.rows, true)),
        x_out(shape.rows, tokens(), shape.channels, random_place()),
        x_in(rows.total, tokens(), shape.channels, random_place()),
        out(rows.total, tokens(), shape.channels, random_place()),
        cache(rows, tokens(), shape.channels, random_place()),
        put(one_of({Put::nowhere, Put::out, Put::x_in})),
        x_in_before(x_in),
        out_before(out),
        cache_before(cache) {
    add_oddities(x_out);
  }
  int64_t tokens() const { return k.shape.frames * k.shape.places; }

  StackResidualMeter parameters() {
    StackResidualMeter p{};
    p.x_out = x_out.data();
    p.x_in = x_in.data();
    p.x_out_strides = x_out.strides;
    p.x_in_strides = x_in.strides;
    if (put == Put::out) {
      p.out = out.data();
      p.out_strides = out.strides;
    } else if (put == Put::x_in) {
      p.out = x_in.data();
      p.out_strides = x_in.strides;
    }
    p.rows = rows.get();
    p.residual = cache.get(dtype_of<Stored>);
    p.shape = k.shape;
    p.motion = k.motion;
    p.all_columns = k.all_columns;
    p.dtype = dtype_of<T>;
    return p;
  }
  void reset() {
    x_in.memory = x_in_before.memory;
    out.memory = out_before.memory;
    cache.stored.memory = cache_before.stored.memory;
    cache.scale.memory = cache_before.scale.memory;
  }

  void check(const Sums& sums) {
    const auto known = [&](int64_t b) { return rows.of(b) >= 0; };
    const auto r = [&](int64_t b, int64_t n, int64_t c) {
      return element_sum<T>(x_out(b, n, c), -x_in_before(rows.of(b), n, c));
    };
    const auto scattered = [&](bool written, const HostTensor<T>& before) {
      std::vector<int64_t> from(rows.total, -1);
      for (int64_t b = 0; b < k.shape.rows && written; ++b)
        if (known(b)) from[rows.of(b)] = b;
      return [this, from, &before](int64_t row, int64_t n, int64_t c) {
        return from[row] >= 0 ? x_out(from[row], n, c) : before(row, n, c);
      };
    };
    expect_tensor("x_in", x_in, x_in_before, scattered(put == Put::x_in, x_in_before));
    expect_tensor("out", out, out_before, scattered(put == Put::out, out_before));
    expect_cache(cache, cache_before, k.shape.rows, known, r);
    const auto old = [&](int64_t b, int64_t n, int64_t c) { return cache_before(rows.of(b), n, c); };
    expect_sums(sums,
                expected_sums(k.shape, k.motion, k.all_columns, k.videos, k.video_of_row, known, r, old),
                k.motion);
  }
};

// Runs the meter twice, checks the results, and compares the sums bitwise.
template <class Scene, class Run>
void check_twice(Scene& scene, const Run& run) {
  const Sums sums = run();
  scene.check(sums);
  scene.reset();
  const Sums again = run();
  expect(std::memcmp(again.data(), sums.data(), sums.size() * 8) == 0, "the sums of a second run differ");
}

}  // namespace adacache::host

// SPDX-License-Identifier: Apache-2.0
// Tensors, random cases and comparison with plain float64 loops for the kernel bodies.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "../../csrc/cuda/bodies/gated_residual_meter.h"
#include "host_block.h"

namespace adacache::host {

constexpr double nan = std::numeric_limits<double>::quiet_NaN();

inline std::mt19937_64 generator;
inline std::string current_case;

inline void fail(const std::string& what) {
  std::printf("FAILED %s: %s\n", current_case.c_str(), what.c_str());
  std::exit(1);
}

inline void expect(bool condition, const std::string& what) {
  if (!condition) fail(what);
}

inline int64_t pick(int64_t first, int64_t last) {
  return std::uniform_int_distribution<int64_t>(first, last)(generator);
}

template <class Value>
Value one_of(std::initializer_list<Value> values) {
  return values.begin()[pick(0, static_cast<int64_t>(values.size()) - 1)];
}

inline bool once_in(int64_t times) { return pick(1, times) == 1; }

// Rounds arithmetically, independent of the bit-level code under test: the nearest multiple of the format's
// spacing at this magnitude.
template <class T>
double nearest(double value) {
  if constexpr (sizeof(T) == 4) return static_cast<float>(value);
  if (value == 0 || !std::isfinite(value)) return value;
  int exponent;
  std::frexp(value, &exponent);
  const int spacing = std::is_same_v<T, float16>    ? std::max(exponent - 11, -24)
                      : std::is_same_v<T, bfloat16> ? exponent - 8
                                                    : std::max(exponent - 4, -9);
  return std::ldexp(std::nearbyint(std::ldexp(value, -spacing)), spacing);
}

// Memory layout of a tensor: elements before the first one (offset), and between tokens and rows (padding).
struct Place {
  int64_t offset, padding;
};

inline Place random_place() {
  switch (pick(0, 4)) {
    case 0:
      return {pick(0, 3), pick(0, 5)};  // rarely aligned to a vector
    case 1:
      return {16 * pick(0, 2), 16 * pick(0, 2)};
    default:
      return {0, 0};
  }
}

// A strided tensor [rows, tokens, channels] in a buffer; the other elements of the buffer must not change.
template <class T>
struct HostTensor {
  int64_t rows, tokens, channels, offset;
  TokenStrides strides;
  std::vector<T> memory;

  HostTensor(int64_t rows, int64_t tokens, int64_t channels, Place place = {0, 0}, float scale = 1)
      : rows(rows), tokens(tokens), channels(channels), offset(place.offset) {
    strides.token = channels + place.padding;
    strides.batch = strides.token * tokens + place.padding;
    memory.resize(offset + rows * strides.batch + place.padding);
    std::normal_distribution<float> normal(0, scale);
    for (T& element : memory) from_float(normal(generator), element);
  }
  void fill(float value) {
    for (T& element : memory) from_float(value, element);
  }
  int64_t at(int64_t row, int64_t token, int64_t channel) const {
    return offset + row * strides.batch + token * strides.token + channel;
  }
  double operator()(int64_t row, int64_t token, int64_t channel) const {
    return to_float(memory[at(row, token, channel)]);
  }
  T* data() { return memory.data() + offset; }
};

inline bool same(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }

// close(got, want) is true for an accepted element. Memory around the tensor must be unchanged.
template <class T, class Expected, class Close>
void expect_tensor(const char* name, const HostTensor<T>& actual, const HostTensor<T>& before,
                   const Expected& expected, const Close& close) {
  std::vector<char> inside(actual.memory.size());
  for (int64_t b = 0; b < actual.rows; ++b)
    for (int64_t n = 0; n < actual.tokens; ++n)
      for (int64_t c = 0; c < actual.channels; ++c) {
        inside[actual.at(b, n, c)] = true;
        const double got = actual(b, n, c), want = expected(b, n, c);
        if (!close(got, want) && !same(got, want))
          fail(std::string(name) + "[" + std::to_string(b) + ", " + std::to_string(n) + ", " +
               std::to_string(c) + "] is " + std::to_string(got) + ", expected " + std::to_string(want));
      }
  for (size_t i = 0; i < inside.size(); ++i)
    if (!inside[i] && !same(to_float(actual.memory[i]), to_float(before.memory[i])))
      fail(std::string(name) + ": element " + std::to_string(i) + " around the tensor is written");
}

template <class T, class Expected>
void expect_tensor(const char* name, const HostTensor<T>& actual, const HostTensor<T>& before,
                   const Expected& expected) {
  expect_tensor(name, actual, before, expected, same);
}

template <class T>
void expect_same_bits(const char* name, const HostTensor<T>& a, const HostTensor<T>& b) {
  if (a.channels == 0) return;  // the memory may be empty
  for (int64_t row = 0; row < a.rows; ++row)
    for (int64_t n = 0; n < a.tokens; ++n)
      expect(std::memcmp(&a.memory[a.at(row, n, 0)], &b.memory[b.at(row, n, 0)], a.channels * sizeof(T)) == 0,
             std::string(name) + ": bits differ");
}

// Rows of a tensor that a batch selects. Some cases contain an out-of-range index.
struct HostRows {
  std::vector<int32_t> index;  // empty: the identity
  int64_t total;

  RowIndex get() const { return {index.empty() ? nullptr : index.data(), total}; }
  int64_t of(int64_t row) const { return row_of(get(), row); }
};

inline HostRows random_rows(int64_t rows, bool distinct) {
  HostRows picked{{}, rows};
  if (rows == 0 || !once_in(3)) return picked;
  picked.total = rows + pick(0, 2);
  std::vector<int32_t> all(picked.total);
  for (int64_t i = 0; i < picked.total; ++i) all[i] = static_cast<int32_t>(i);
  std::shuffle(all.begin(), all.end(), generator);
  for (int64_t b = 0; b < rows; ++b)
    picked.index.push_back(distinct ? all[b] : static_cast<int32_t>(pick(0, picked.total - 1)));
  if (once_in(4))
    picked.index[pick(0, rows - 1)] =
        one_of({-1, static_cast<int32_t>(picked.total), std::numeric_limits<int32_t>::min(),
                std::numeric_limits<int32_t>::max()});
  return picked;
}

template <class T>
constexpr DType dtype_of = std::is_same_v<T, float>      ? DType::float32
                           : std::is_same_v<T, bfloat16> ? DType::bfloat16
                           : std::is_same_v<T, float16>  ? DType::float16
                                                         : DType::float8_e4m3;

// Which kernels the modulators of a case require: those for T, or for General<T>.
template <class Element>
constexpr bool is_general_case = Elements<Element>::general;

// A gate, shift or scale: absent, per row, per frame, per token, or broadcast to all rows. For General<T>
// also in float32, or with a table.
template <class Element>
struct HostModulator {
  using T = typename Elements<Element>::Type;
  enum class Kind { absent, row, frame, token, everywhere } kind;
  bool wide = is_general_case<Element> && once_in(2), has_table = is_general_case<Element> && once_in(2);
  int64_t places;
  HostTensor<T> narrow_tensor;
  HostTensor<float> wide_tensor, table;

  HostModulator(const TokenShape& shape, Kind kind, Place place)
      : kind(kind),
        places(shape.places),
        narrow_tensor(rows_of(shape, kind), tokens_of(shape, kind), shape.channels, place),
        wide_tensor(rows_of(shape, kind), tokens_of(shape, kind), shape.channels, place),
        table(1, 1, shape.channels, {once_in(4) ? 1 : 0, 0}) {}
  double operator()(int64_t row, int64_t n, int64_t c) const {
    const int64_t b = kind == Kind::everywhere ? 0 : row;
    const int64_t token = kind == Kind::frame ? n / places : kind == Kind::token ? n : 0;
    const double value = wide ? wide_tensor(b, token, c) : narrow_tensor(b, token, c);
    return has_table ? static_cast<float>(table(0, 0, c) + value) : value;
  }
  bool present() const { return kind != Kind::absent; }
  Modulator get() {
    if (!present()) return {};
    const TokenStrides& strides = wide ? wide_tensor.strides : narrow_tensor.strides;
    Modulator modulator{};
    modulator.data = wide ? static_cast<void*>(wide_tensor.data()) : narrow_tensor.data();
    modulator.dtype = wide ? DType::float32 : dtype_of<T>;
    modulator.table = has_table ? table.data() : nullptr;
    if (kind != Kind::everywhere) modulator.batch = strides.batch;
    if (kind == Kind::frame) modulator.frame = strides.token;
    if (kind == Kind::token) {
      modulator.frame = strides.token * places;
      modulator.place = strides.token;
    }
    return modulator;
  }

 private:
  static int64_t rows_of(const TokenShape& shape, Kind kind) {
    return kind == Kind::absent ? 0 : kind == Kind::everywhere ? 1 : shape.rows;
  }
  static int64_t tokens_of(const TokenShape& shape, Kind kind) {
    return kind == Kind::frame ? shape.frames : kind == Kind::token ? shape.frames * shape.places : 1;
  }
};

template <class Element>
HostModulator<Element> random_modulator(const TokenShape& shape, Place place) {
  using Kind = typename HostModulator<Element>::Kind;
  return {shape, one_of({Kind::absent, Kind::row, Kind::row, Kind::frame, Kind::token, Kind::everywhere}),
          place};
}

// gate * y as a float, and the kept r, for a gate that may be absent.
template <class Element>
double product_of(const HostModulator<Element>& gate, double y, int64_t row, int64_t n, int64_t c) {
  return gate.present() ? static_cast<float>(gate(row, n, c) * y) : y;
}

template <class Element>
Rounding random_rounding() {
  return is_general_case<Element> && once_in(2) ? Rounding::float32 : Rounding::eager;
}

// A cached residual; float8 has one scale per token.
template <class Stored>
struct HostCache {
  HostRows rows;
  HostTensor<Stored> stored;
  HostTensor<float> scale;  // [rows, tokens, 1]

  HostCache(const HostRows& rows, int64_t tokens, int64_t channels, Place place)
      : rows(rows),
        stored(rows.total, tokens, channels, place, scaled ? 100 : 1),
        scale(rows.total, tokens, 1) {}
  double operator()(int64_t row, int64_t n, int64_t c) const {
    return scaled ? static_cast<float>(scale(row, n, 0) * stored(row, n, c)) : stored(row, n, c);
  }
  Cache get(DType dtype) {
    Cache cache{stored.data(), stored.strides, dtype, nullptr, {}, rows.get()};
    if (scaled) {
      cache.scale = scale.data();
      cache.scale_strides = scale.strides;
    }
    return cache;
  }
  static constexpr bool scaled = std::is_same_v<Stored, float8_e4m3>;
};

// float8 quantization of one token r(c): its scale and the stored elements.
struct Quantised {
  float scale, inverse;

  template <class R>
  Quantised(int64_t channels, const R& r) {
    double largest = 0;
    for (int64_t c = 0; c < channels; ++c) {
      if (std::isnan(r(c))) largest = nan;
      if (!(std::fabs(r(c)) <= largest)) largest = std::isnan(largest) ? nan : std::fabs(r(c));
    }
    const auto of_float = static_cast<float>(largest);
    const bool nothing = of_float < std::ldexp(1.0f, -100);
    scale = nothing ? 1.0f : of_float * (1.0f / 448.0f);
    inverse = nothing ? 1.0f : 448.0f / of_float;
  }
  double operator()(double r) const {
    return nearest<float8_e4m3>(static_cast<float>(static_cast<float>(r) * inverse));
  }
};

using Sums = std::vector<double>;

// The sums of r(b, n, c) and old(b, n, c), by definition. Rows with known(b) false set the sums of their
// video to NaN.
template <class Known, class New, class Old>
Sums expected_sums(const TokenShape& shape, const MotionStrides& motion, bool all_columns, int64_t videos,
                   const std::vector<int32_t>& video_of_row, const Known& known, const New& r,
                   const Old& old) {
  const int columns = sum_columns(motion);
  Sums sums(videos * columns, 0.0);
  for (int64_t b = 0; b < shape.rows; ++b) {
    const int64_t video = video_of_row.empty() ? 0 : video_of_row[b];
    if (video < 0 || video >= videos) return Sums(videos * columns, nan);
    double* s = sums.data() + video * columns;
    if (!known(b)) {
      if (shape.frames * shape.places * shape.channels > 0)
        for (int column = 0; column < columns; ++column) s[column] = nan;
      continue;
    }
    for (int64_t n = 0; n < shape.frames * shape.places; ++n)
      for (int64_t c = 0; c < shape.channels; ++c) {
        const double a = r(b, n, c), o = old(b, n, c);
        s[abs_diff] += std::fabs(a - o);
        s[abs_old] += std::fabs(o);
        s[abs_new] += std::fabs(a);
        s[sq_diff] += (a - o) * (a - o);
        s[sq_old] += o * o;
        s[sq_new] += a * a;
        s[dot] += a * o;
        for (int i = 0; i < motion.count; ++i)
          if (n + motion.stride[i] * shape.places < shape.frames * shape.places) {
            const double later = r(b, n + motion.stride[i] * shape.places, c);
            s[first_motion_column + 2 * i] += std::fabs(later - a);
            s[first_motion_column + 2 * i + 1] += std::fabs(later) + std::fabs(a);
          }
      }
  }
  for (size_t i = 0; i < sums.size(); ++i)
    if (const int column = static_cast<int>(i % columns); !measured(column, all_columns)) sums[i] = nan;
  return sums;
}

// The error of a thread's float32 sums is proportional to the magnitude of the summands: |r| and |old|, or
// their squares.
inline void expect_sums(const Sums& actual, const Sums& expected, const MotionStrides& motion) {
  const int columns = sum_columns(motion);
  for (size_t i = 0; i < expected.size(); ++i) {
    const double* of_video = expected.data() + i / columns * columns;
    const size_t column = i % columns;
    const bool square = column >= sq_diff && column <= dot;
    double magnitude = std::fabs(expected[i]);
    for (const int other : {square ? sq_old : abs_old, square ? sq_new : abs_new})
      if (std::isfinite(of_video[other])) magnitude += of_video[other];
    if (!same(actual[i], expected[i]) && !(std::fabs(actual[i] - expected[i]) <= 2e-6 * magnitude))
      fail("sums[" + std::to_string(i) + "] is " + std::to_string(actual[i]) + ", expected " +
           std::to_string(expected[i]));
  }
}

inline std::vector<int64_t> in_order(int64_t count) {
  std::vector<int64_t> indices(count);
  for (int64_t i = 0; i < count; ++i) indices[i] = i;
  return indices;
}

// The blocks of a GPU run in any order.
inline std::vector<int64_t> in_any_order(int64_t count) {
  std::vector<int64_t> indices = in_order(count);
  std::shuffle(indices.begin(), indices.end(), generator);
  return indices;
}

// Launches body(block, partials) as a meter and sums the partials with video_sums_body.
template <class Body>
Sums run_meter(const TokenShape& shape, const MotionStrides& motion, bool all_columns, const Plan& plan,
               int64_t shared_bytes, int64_t videos, const std::vector<int32_t>& video_of_row,
               const Body& body) {
  const int columns = sum_columns(motion);
  std::vector<double> partials(plan.blocks * columns, nan);
  launch(in_any_order(plan.blocks), plan.threads, shared_bytes,
         [&](HostBlock& block) { body(block, partials.data()); });
  Sums sums(videos * columns, -1.0);
  const VideoSums v{partials.data(),
                    video_of_row.empty() ? nullptr : video_of_row.data(),
                    sums.data(),
                    shape.rows,
                    plan.blocks_per_row,
                    videos,
                    columns,
                    all_columns};
  constexpr int threads = 64;
  launch(in_order(videos * columns), threads, video_sums_shared_bytes(threads),
         [&](HostBlock& block) { video_sums_body(block, v); });
  return sums;
}

// Common parameters of meter cases.
struct MeterCase {
  TokenShape shape;
  MotionStrides motion = {};
  bool all_columns = once_in(2);
  int64_t videos = 1;
  std::vector<int32_t> video_of_row;

  explicit MeterCase(const TokenShape& shape) : shape(shape) {
    for (int i = static_cast<int>(pick(0, 3)); i > 0 && shape.frames > 1; --i)
      motion.stride[motion.count++] = static_cast<int>(pick(1, shape.frames - 1));
    if (once_in(10) && shape.frames > 1)
      while (motion.count < max_motion_strides)
        motion.stride[motion.count++] = static_cast<int>(pick(1, shape.frames - 1));
    if (once_in(2)) {
      videos = pick(1, 3);
      for (int64_t b = 0; b < shape.rows; ++b)
        video_of_row.push_back(static_cast<int32_t>(pick(0, videos - 1)));
      if (once_in(8) && shape.rows > 0) video_of_row[pick(0, shape.rows - 1)] = static_cast<int32_t>(videos);
    }
  }
};

// Changes segments and history: the plans of small shapes cover few variants.
inline void vary(Plan& plan, const TokenShape& shape, const MotionStrides& motion, bool divisible) {
  if (plan.blocks == 0) return;
  if (plan.history > 0 && once_in(2)) plan.history = motion.stride[pick(0, motion.count - 1)];
  if (!divisible) return;
  plan.per_segment = static_cast<int>(pick(1, shape.frames));
  plan.segments = (shape.frames + plan.per_segment - 1) / plan.per_segment;
  plan.blocks_per_row = plan.segments * plan.blocks_per_segment;
  plan.blocks = shape.rows * plan.blocks_per_row;
}

// One shape per dimension that can be 0. Every op runs all of them in every dtype.
constexpr TokenShape empty_shapes[] = {{0, 3, 4, 16}, {2, 3, 0, 16}, {2, 3, 4, 0}, {0, 1, 0, 0}};

inline TokenShape random_shape(int64_t most_channels) {
  if (once_in(25)) return {pick(0, 2), pick(1, 3), pick(0, 2), pick(0, 9)};
  const int64_t channels =
      once_in(3) ? pick(1, most_channels) : 8 * pick(1, std::max<int64_t>(1, most_channels / 8));
  return {pick(1, 3), pick(1, 9), once_in(4) ? pick(1, 20) : pick(1, 5), channels};
}

inline std::string describe(const char* op, int64_t number, const TokenShape& shape, DType dtype) {
  return std::string(op) + " case " + std::to_string(number) + ": [" + std::to_string(shape.rows) + ", " +
         std::to_string(shape.frames) + " * " + std::to_string(shape.places) + ", " +
         std::to_string(shape.channels) + "] dtype " + std::to_string(static_cast<int>(dtype));
}

// Calls function(T{}, shape) for the empty shapes in each dtype.
template <class Function>
void for_each_empty_case(const Function& function) {
  for (const DType dtype : {DType::float32, DType::bfloat16, DType::float16})
    for (const TokenShape& shape : empty_shapes)
      dispatch(dtype, [&](auto element) { function(element, shape); });
}

template <class Function>
void with_random_dtype(const Function& function) {
  dispatch(one_of({DType::float32, DType::bfloat16, DType::float16}), function);
}

// Run `cases` random cases of each op.
void elementwise_cases(int64_t cases);
void meter_cases(int64_t cases);
void token_cases(int64_t cases);

}  // namespace adacache::host

// Runs the bodies of the CUDA kernels on the host and compares them with plain loops in float64. Exits with 1
// and says what differs, or prints how many cases passed. Usage: kernels_on_host [--seed N] [--every N]
// [--drop-barriers]
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/core/gated_residual_meter.h"
#include "../../csrc/core/residual_meter.h"
#include "../../csrc/core/reuse_residual.h"
#include "host_block.h"

namespace adacache::host {
namespace {

constexpr int threads = 64;
constexpr double nan = std::numeric_limits<double>::quiet_NaN();

std::mt19937_64 generator;
std::string current_case;

void fail(const std::string& what) {
  std::printf("FAILED %s: %s\n", current_case.c_str(), what.c_str());
  std::exit(1);
}

void expect(bool condition, const std::string& what) {
  if (!condition) fail(what);
}

// Rounding by arithmetic, not by bits: the nearest multiple of the spacing that the format has at this
// magnitude.
template <class T>
double nearest(double value) {
  if constexpr (sizeof(T) == 4) return static_cast<float>(value);
  const bool half = std::is_same_v<T, float16>;
  if (value == 0 || !std::isfinite(value)) return value;
  int exponent;
  std::frexp(value, &exponent);
  const int spacing = half ? std::max(exponent - 11, -24) : exponent - 8;
  return std::ldexp(std::nearbyint(std::ldexp(value, -spacing)), spacing);
}

// A strided tensor [rows, tokens, channels] within a buffer whose other elements must stay as they are.
template <class T>
struct HostTensor {
  int64_t rows, tokens, channels, offset;
  TokenStrides strides;
  std::vector<T> memory;

  HostTensor(int64_t rows, int64_t tokens, int64_t channels, int64_t padding, int64_t offset)
      : rows(rows), tokens(tokens), channels(channels), offset(offset) {
    strides.token = channels + padding;
    strides.batch = strides.token * tokens + padding;
    memory.resize(offset + rows * strides.batch + padding + 16);
    std::normal_distribution<float> normal;
    for (T& element : memory) from_float(normal(generator), element);
  }
  int64_t at(int64_t row, int64_t token, int64_t channel) const {
    return offset + row * strides.batch + token * strides.token + channel;
  }
  double operator()(int64_t row, int64_t token, int64_t channel) const {
    return to_float(memory[at(row, token, channel)]);
  }
  T* data() { return memory.data() + offset; }
};

template <class T, class Expected>
void expect_tensor(const char* name, const HostTensor<T>& actual, const HostTensor<T>& before,
                   const Expected& expected) {
  std::vector<double> want(actual.memory.size());
  for (size_t i = 0; i < want.size(); ++i) want[i] = to_float(before.memory[i]);
  for (int64_t b = 0; b < actual.rows; ++b)
    for (int64_t n = 0; n < actual.tokens; ++n)
      for (int64_t c = 0; c < actual.channels; ++c) want[actual.at(b, n, c)] = expected(b, n, c);
  for (size_t i = 0; i < want.size(); ++i) {
    const double got = to_float(actual.memory[i]);
    if (!(got == want[i] || (std::isnan(got) && std::isnan(want[i]))))
      fail(std::string(name) + ": element " + std::to_string(i) + " is " + std::to_string(got) +
           ", expected " + std::to_string(want[i]));
  }
}

using Sums = std::vector<double>;

// The sums between r(b, n, c) and old(b, n, c), by the definition.
template <class New, class Old>
Sums expected_sums(const MeterShape& shape, const MotionStrides& motion, bool all_columns, int64_t videos,
                   const std::vector<int32_t>& video_of_row, const New& r, const Old& old) {
  const int columns = sum_columns(motion);
  Sums sums(videos * columns, 0.0);
  for (int64_t b = 0; b < shape.rows; ++b) {
    const int64_t video = video_of_row.empty() ? 0 : video_of_row[b];
    if (video < 0 || video >= videos) return Sums(videos * columns, nan);
    double* s = sums.data() + video * columns;
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
    if (const int column = static_cast<int>(i % columns); !all_columns && column >= sq_diff && column <= dot)
      sums[i] = nan;
  return sums;
}

void expect_sums(const Sums& actual, const Sums& expected, double magnitude) {
  for (size_t i = 0; i < expected.size(); ++i) {
    const bool same = std::isnan(expected[i]) ? std::isnan(actual[i])
                                              : std::fabs(actual[i] - expected[i]) <= 2e-6 * (magnitude + 1);
    if (!same)
      fail("sums[" + std::to_string(i) + "] is " + std::to_string(actual[i]) + ", expected " +
           std::to_string(expected[i]));
  }
}

template <class T, class Parameters>
int width_of(const Parameters& p, bool scalar) {
  return !scalar && vectors_fit(p, vector_width<T>) ? vector_width<T> : 1;
}

template <class Parameters, class Body>
Sums run_meter(const Parameters& p, int width, int64_t videos, const std::vector<int32_t>& video_of_row,
               const Body& body) {
  const int64_t blocks_per_row = meter_blocks_per_row(p.shape, width, threads);
  const int columns = sum_columns(p.motion);
  std::vector<double> partials(p.shape.rows * blocks_per_row * columns, nan);
  launch(p.shape.rows * blocks_per_row, threads, meter_shared_bytes(threads, p.motion),
         [&](HostBlock& block) { body(block, partials.data()); });
  Sums sums(videos * columns, -1.0);
  const VideoSums v{partials.data(), video_of_row.empty() ? nullptr : video_of_row.data(),
                    sums.data(),     p.shape.rows,
                    blocks_per_row,  videos,
                    columns,         p.all_columns};
  launch(videos * columns, threads, video_sums_shared_bytes(threads),
         [&](HostBlock& block) { video_sums_body(block, v); });
  return sums;
}

enum class Gate { shared, frame, token };

struct Case {
  int64_t rows, frames, places, channels;
  int64_t padding = 0, offset = 0;  // elements between tokens, and before the first
  std::vector<int> strides = {1};
  Gate gate = Gate::shared;
  bool all_columns = false;
  bool in_place = false;
  bool scalar = false;  // single elements even where vectors would fit
  int64_t videos = 1;
  std::vector<int32_t> video_of_row = {};
};

template <class T>
void meter_case(const Case& k, DType dtype) {
  const int64_t tokens = k.frames * k.places;
  HostTensor<T> x(k.rows, tokens, k.channels, k.padding, k.offset),
      y(k.rows, tokens, k.channels, k.padding, 0);
  HostTensor<T> gate(k.rows,
                     k.gate == Gate::shared  ? 1
                     : k.gate == Gate::frame ? k.frames
                                             : tokens,
                     k.channels, k.padding, k.offset);
  HostTensor<T> residual(k.rows, tokens, k.channels, k.padding, k.offset),
      out(k.rows, tokens, k.channels, k.padding, 0);
  const HostTensor<T> x_before = x, residual_before = residual, out_before = out;
  const auto gate_token = [&](int64_t n) {
    return k.gate == Gate::shared ? 0 : k.gate == Gate::frame ? n / k.places : n;
  };
  const auto r = [&](int64_t b, int64_t n, int64_t c) {
    return nearest<T>(static_cast<float>(gate(b, gate_token(n), c) * y(b, n, c)));
  };
  const auto x_out = [&](int64_t b, int64_t n, int64_t c) {
    return nearest<T>(static_cast<float>(x_before(b, n, c) + r(b, n, c)));
  };
  const auto old = [&](int64_t b, int64_t n, int64_t c) { return residual_before(b, n, c); };

  GatedResidualMeter p{};
  p.shape = {k.rows, k.frames, k.places, k.channels};
  p.x = x.data();
  p.y = y.data();
  p.gate = gate.data();
  p.residual = residual.data();
  p.out = k.in_place ? x.data() : out.data();
  p.x_strides = x.strides;
  p.y_strides = y.strides;
  p.residual_strides = residual.strides;
  p.out_strides = k.in_place ? x.strides : out.strides;
  p.gate_batch = gate.strides.batch;
  p.gate_frame = k.gate == Gate::shared ? 0 : gate.strides.token * (k.gate == Gate::token ? k.places : 1);
  p.gate_place = k.gate == Gate::token ? gate.strides.token : 0;
  for (const int stride : k.strides) p.motion.stride[p.motion.count++] = stride;
  p.all_columns = k.all_columns;
  p.dtype = dtype;

  // As in csrc/cuda: single elements are always measured in full.
  const int width = width_of<T>(p, k.scalar);
  const auto run = [&] {
    return run_meter(p, width, k.videos, k.video_of_row, [&](HostBlock& block, double* partials) {
      if (width == 1)
        gated_residual_meter_body<T, 1, true>(block, p, partials);
      else if (k.all_columns)
        gated_residual_meter_body<T, vector_width<T>, true>(block, p, partials);
      else
        gated_residual_meter_body<T, vector_width<T>, false>(block, p, partials);
    });
  };
  const Sums sums = run();
  const double magnitude = static_cast<double>(k.rows * tokens * k.channels);
  const Sums expected = expected_sums(p.shape, p.motion, k.all_columns, k.videos, k.video_of_row, r, old);
  expect_sums(sums, expected, magnitude);
  expect_tensor("residual", residual, residual_before, r);
  if (k.in_place)
    expect_tensor("x", x, x_before, x_out);
  else
    expect_tensor("out", out, out_before, x_out);

  residual = residual_before;
  x = x_before;
  p.residual = residual.data();
  p.x = x.data();
  if (k.in_place) p.out = x.data();
  const Sums again = run();
  expect(std::memcmp(again.data(), sums.data(), sums.size() * 8) == 0, "a second run gives other bits");

  HostTensor<T> before = residual_before;
  ResidualMeter q{};
  q.shape = p.shape;
  q.residual = residual.data();
  q.old = before.data();
  q.residual_strides = residual.strides;
  q.old_strides = before.strides;
  q.motion = p.motion;
  q.all_columns = k.all_columns;
  q.dtype = dtype;
  const int meter_width = width_of<T>(q, k.scalar);
  expect_sums(run_meter(q, meter_width, k.videos, k.video_of_row,
                        [&](HostBlock& block, double* partials) {
                          if (meter_width == 1)
                            residual_meter_body<T, 1, true>(block, q, partials);
                          else if (k.all_columns)
                            residual_meter_body<T, vector_width<T>, true>(block, q, partials);
                          else
                            residual_meter_body<T, vector_width<T>, false>(block, q, partials);
                        }),
              expected, magnitude);
}

template <class T, class R>
void reuse_case(const Case& k, DType dtype, DType residual_dtype, const std::vector<char>& reuse) {
  const int64_t tokens = k.frames * k.places;
  HostTensor<T> x(k.rows, tokens, k.channels, k.padding, k.offset),
      out(k.rows, tokens, k.channels, k.padding, 0);
  HostTensor<R> residual(k.rows, tokens, k.channels, k.padding, k.offset);
  const HostTensor<T> x_before = x, out_before = out;
  const std::unique_ptr<bool[]> flags(new bool[reuse.size() + 1]);
  for (size_t i = 0; i < reuse.size(); ++i) flags[i] = reuse[i];
  ReuseResidual p{};
  p.x = x.data();
  p.residual = residual.data();
  p.out = k.in_place ? x.data() : out.data();
  p.video_of_row = k.video_of_row.empty() ? nullptr : k.video_of_row.data();
  p.reuse = reuse.empty() ? nullptr : flags.get();
  p.videos = reuse.empty() ? 1 : static_cast<int64_t>(reuse.size());
  p.x_strides = x.strides;
  p.residual_strides = residual.strides;
  p.out_strides = k.in_place ? x.strides : out.strides;
  p.rows = k.rows;
  p.tokens = tokens;
  p.channels = k.channels;
  p.dtype = dtype;
  p.residual_dtype = residual_dtype;
  const int width = width_of<T>(p, k.scalar);
  launch(p.rows * reuse_blocks_per_row(p, width, threads), threads, 0, [&](HostBlock& block) {
    if (width == 1)
      reuse_residual_body<T, 1, AnyElement>(block, p);
    else
      reuse_residual_body<T, vector_width<T>, KnownElements<R, vector_width<T>>>(block, p);
  });
  const auto expected = [&](int64_t b, int64_t n, int64_t c) {
    const int64_t video = !k.video_of_row.empty() ? k.video_of_row[b] : p.videos == 1 ? 0 : b;
    if (!reuse.empty() && (video < 0 || video >= p.videos)) return nan;
    if (!reuse.empty() && !reuse[video]) return x_before(b, n, c);
    return nearest<T>(static_cast<float>(x_before(b, n, c) + residual(b, n, c)));
  };
  if (k.in_place)
    expect_tensor("x", x, x_before, expected);
  else
    expect_tensor("out", out, out_before, expected);
}

template <class Function>
void with_dtypes(const Function& function) {
  for (const DType dtype : {DType::float32, DType::bfloat16, DType::float16})
    dispatch(dtype, [&](auto element) { function(element, dtype); });
}

// Every bit pattern of the 16-bit formats survives, and rounding agrees with arithmetic between them.
void conversions() {
  current_case = "conversions";
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    bfloat16 brain{static_cast<uint16_t>(bits)}, brain_again;
    from_float(to_float(brain), brain_again);
    float16 half{static_cast<uint16_t>(bits)}, half_again;
    from_float(to_float(half), half_again);
    const bool brain_nan = (bits & 0x7fff) > 0x7f80, half_nan = (bits & 0x7fff) > 0x7c00;
    expect(brain_nan ? std::isnan(to_float(brain_again)) : brain_again.bits == bits,
           "bfloat16 " + std::to_string(bits));
    expect(half_nan ? std::isnan(to_float(half_again)) : half_again.bits == bits,
           "float16 " + std::to_string(bits));
  }
  std::uniform_real_distribution<float> mantissa(-2, 2);
  std::uniform_int_distribution<int> exponent(-26, 14);
  for (int i = 0; i < 200000; ++i) {
    const float value = std::ldexp(mantissa(generator), exponent(generator));
    expect(rounded<bfloat16>(value) == nearest<bfloat16>(value), "bfloat16 of " + std::to_string(value));
    expect(rounded<float16>(value) == nearest<float16>(value), "float16 of " + std::to_string(value));
  }
  expect(std::isinf(rounded<float16>(65520.0f)) && rounded<float16>(65519.0f) == 65504.0f,
         "float16 overflow");
  expect(rounded<float16>(std::ldexp(1.0f, -25)) == 0 &&
             rounded<float16>(std::ldexp(1.5f, -25)) == std::ldexp(1.0f, -24),
         "float16 underflow");
}

int run(uint64_t seed, int every) {
  generator.seed(seed);
  conversions();
  const std::vector<Case> cases = {
      {1, 1, 1, 1, 0, 0, {}},
      {2, 3, 5, 8},
      {1, 5, 9, 33, 0, 0, {1, 2}},
      {2, 4, 7, 64, 8, 8, {1, 3}, Gate::frame, true},
      {1, 3, 70, 16, 0, 0, {2}, Gate::token},
      {3, 2, 3, 40, 3, 1, {1}, Gate::frame, false, false, false, 2, {1, 0, 1}},
      {2, 6, 4, 24, 16, 0, {1, 2, 3, 4, 5}, Gate::token, true, true},
      {1, 9, 2, 128, 0, 8, {8, 1, 2, 3, 4, 5, 6, 7}, Gate::shared, false, true},
      {2, 3, 11, 16, 0, 0, {1}, Gate::shared, false, false, true},
      {4, 2, 2, 8, 0, 0, {1}, Gate::shared, true, false, false, 3, {2, 0, 0, 2}},
      {2, 2, 3, 8, 0, 0, {1}, Gate::shared, false, false, false, 2, {0, 2}},
      {0, 2, 3, 8},
      {2, 2, 0, 8},
      {2, 2, 3, 0},
      {1, 7, 1, 515, 1, 0, {3}, Gate::frame, true},
  };
  int number = 0;
  int count = 0;
  for (const Case& k : cases)
    with_dtypes([&](auto element, DType dtype) {
      if (number++ % every != 0) return;
      current_case = "case " + std::to_string(number - 1) + ": [" + std::to_string(k.rows) + ", " +
                     std::to_string(k.frames) + " * " + std::to_string(k.places) + ", " +
                     std::to_string(k.channels) + "] dtype " + std::to_string(static_cast<int>(dtype));
      meter_case<decltype(element)>(k, dtype);
      std::vector<char> reuse;
      if (k.videos > 1)
        for (int64_t i = 0; i < k.videos; ++i) reuse.push_back(i % 2 == 0);
      // One type of R for each case and type of x; together the cases meet all pairs.
      const auto residual_dtype = static_cast<DType>((number - 1) / 3 % 3);
      dispatch(residual_dtype, [&](auto residual_element) {
        reuse_case<decltype(element), decltype(residual_element)>(k, dtype, residual_dtype, reuse);
      });
      ++count;
    });
  std::printf("%d cases passed, seed %" PRIu64 "\n", count, seed);
  return 0;
}

}  // namespace
}  // namespace adacache::host

int main(int argc, char** argv) {
  uint64_t seed = 0;
  int every = 1;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--seed" && i + 1 < argc) seed = std::strtoull(argv[++i], nullptr, 10);
    if (argument == "--every" && i + 1 < argc) every = std::atoi(argv[++i]);
    if (argument == "--drop-barriers") adacache::host::drop_barriers = true;
  }
  return adacache::host::run(seed, every);
}

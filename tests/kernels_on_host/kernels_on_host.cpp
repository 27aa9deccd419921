// SPDX-License-Identifier: Apache-2.0
// Runs the bodies of the CUDA kernels on the host and compares them with plain loops in float64. Prints the
// first difference and exits with 1, or prints the number of passed cases.
// Usage: kernels_on_host [--seed N] [--cases N] [--drop-barriers]
#include <algorithm>
#include <cinttypes>

#include "host_tensors.h"

namespace adacache::host {
namespace {

template <class T>
void expect_conversions() {
  // A round trip preserves every bit pattern.
  constexpr uint32_t patterns = 1u << (8 * sizeof(T));
  for (uint32_t bits = 0; bits < patterns; ++bits) {
    const T stored{static_cast<decltype(T::bits)>(bits)};
    T again;
    from_float(to_float(stored), again);
    expect(std::isnan(to_float(stored)) ? std::isnan(to_float(again)) : again.bits == bits,
           "bits " + std::to_string(bits));
  }
  // Rounding agrees with arithmetic rounding, also for subnormal values.
  const int last = std::is_same_v<T, float8_e4m3> ? 8 : 14;
  std::uniform_real_distribution<float> mantissa(-1.75f, 1.75f);
  for (int i = 0; i < 50000; ++i) {
    const float value = std::ldexp(mantissa(generator), static_cast<int>(pick(-26, last)));
    expect(rounded<T>(value) == nearest<T>(value), "rounding of " + std::to_string(value));
  }
  expect(std::isnan(rounded<T>(static_cast<float>(nan))), "NaN");
}

void conversions() {
  current_case = "bfloat16";
  expect_conversions<bfloat16>();
  current_case = "float16";
  expect_conversions<float16>();
  expect(std::isinf(rounded<float16>(65520.0f)) && rounded<float16>(65519.0f) == 65504.0f, "overflow");
  expect(rounded<float16>(std::ldexp(1.0f, -25)) == 0 &&
             rounded<float16>(std::ldexp(1.5f, -25)) == std::ldexp(1.0f, -24),
         "underflow");
  current_case = "float8_e4m3";
  expect_conversions<float8_e4m3>();
  expect(rounded<float8_e4m3>(448.0f) == 448.0f && rounded<float8_e4m3>(-463.0f) == -448.0f, "largest");
}

int run(uint64_t seed, int64_t cases) {
  generator.seed(seed);
  conversions();
  elementwise_cases(cases);
  meter_cases(cases);
  token_cases(cases);
  std::printf("%" PRId64 " random cases of each op passed, seed %" PRIu64 "\n", cases, seed);
  return 0;
}

}  // namespace
}  // namespace adacache::host

int main(int argc, char** argv) {
  uint64_t seed = 0;
  int64_t cases = 200;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--seed" && i + 1 < argc) seed = std::strtoull(argv[++i], nullptr, 10);
    if (argument == "--cases" && i + 1 < argc) cases = std::strtoll(argv[++i], nullptr, 10);
    if (argument == "--drop-barriers") adacache::host::drop_barriers = true;
  }
  return adacache::host::run(seed, cases);
}

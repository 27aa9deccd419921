// Chooses the CPU kernels for this processor, and cuts tensors into units of work.
#include "kernels.h"

#include <cstdlib>
#include <string_view>

namespace adacache::cpu {
namespace {

const Kernels& choose_kernels() {
  const char* environment = std::getenv("ADACACHE_CPU_ISA");
  const std::string_view asked = environment ? environment : "";
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && asked != "avx2" && asked != "baseline") return avx512_kernels;
  if (avx2 && asked != "baseline") return avx2_kernels;
#endif
  return baseline_kernels;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose_kernels();
  return chosen;
}

Units units_of(const MeterShape& shape, DType dtype) {
  // One frame of a unit is to stay in the second-level cache until the next one has met it, and small tensors
  // are to give every core some units.
  constexpr int64_t frame_bytes = 64 * 1024;
  const int64_t token_bytes = shape.channels * (dtype == DType::float32 ? 4 : 2);
  Units units;
  units.places_per_unit = token_bytes > 0 ? frame_bytes / token_bytes : 1;
  if (units.places_per_unit > shape.places / 16) units.places_per_unit = shape.places / 16;
  if (units.places_per_unit < 1) units.places_per_unit = 1;
  units.per_row = (shape.places + units.places_per_unit - 1) / units.places_per_unit;
  units.count = token_bytes > 0 ? shape.rows * units.per_row : 0;
  return units;
}

}  // namespace adacache::cpu

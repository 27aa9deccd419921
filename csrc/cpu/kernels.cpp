// SPDX-License-Identifier: Apache-2.0
// Selects the CPU kernels for this processor.
#include "kernels.h"

#include <cstdlib>
#include <string_view>

namespace adacache::cpu {
namespace {

const Kernels& choose_kernels() {
  const char* environment = std::getenv("ADACACHE_CPU_ISA");
  [[maybe_unused]] const std::string_view asked = environment ? environment : "";
#if defined(ADACACHE_X86_ISAS)
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

}  // namespace adacache::cpu

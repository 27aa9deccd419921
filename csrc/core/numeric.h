// SPDX-License-Identifier: Apache-2.0
// Number formats and rounding, for host, device and vector lanes. Conversions round to nearest even like
// PyTorch, so that results are bit-identical.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define ADACACHE_HD __host__ __device__ __forceinline__
#else
#define ADACACHE_HD inline
#endif

// The CPU kernels are compiled once per instruction set into one library, each copy in its own namespace.
// With shared names the linker would keep one copy of each inline function, possibly with unsupported
// instructions.
#ifndef ADACACHE_ISA
#define ADACACHE_ISA portable
#endif

namespace adacache {

enum class DType : int {
  float32 = 0,
  bfloat16 = 1,
  float16 = 2,
  float8_e4m3 = 3
};  // float8: kept residuals, norms

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};
struct float8_e4m3 {
  uint8_t bits;
};

inline namespace ADACACHE_ISA {

template <class To, class From>
ADACACHE_HD To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// F is float or a float vector, U the unsigned integer type of the same shape; `condition ? a : b` selects
// per lane.

template <class F, class U>
ADACACHE_HD F float_of_bfloat16_bits(U bits) {
  return bit_cast<F>(bits << 16);
}

// Rounded to bfloat16; the caller drops the lower 16 bits.
template <class F, class U>
ADACACHE_HD U float_bits_rounded_to_bfloat16(F value) {
  const U bits = bit_cast<U>(value);
  const U rounded = bits + (((bits >> 16) & 1u) + 0x7fffu);
  return value != value ? bits | 0x400000u : rounded;
}

template <class F, class U>
ADACACHE_HD U bfloat16_bits_of_float(F value) {
  return float_bits_rounded_to_bfloat16<F, U>(value) >> 16;
}

template <class F, class U>
ADACACHE_HD F float_of_float16_bits(U bits) {
  const U magnitude = (bits & 0x7fffu) << 13;
  // The exponent bias differs by 112. Multiplying by 2^112 is also correct for subnormals.
  const F scaled = bit_cast<F>(magnitude) * 5192296858534827628530496329220096.0f;
  const U finite_bits = bit_cast<U>(scaled);
  const U with_special = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite_bits;
  return bit_cast<F>(with_special | ((bits & 0x8000u) << 16));
}

template <class F, class U>
ADACACHE_HD U float16_bits_of_float(F value) {
  const U bits = bit_cast<U>(value);
  const U magnitude = bits & 0x7fffffffu;
  const U normal = (magnitude + (((magnitude >> 13) & 1u) + 0xc8000fffu)) >> 13;
  // Adding 0.5 rounds to the spacing of float16 subnormals, 2^-24.
  const F shifted = bit_cast<F>(magnitude) + 0.5f;
  const U subnormal = bit_cast<U>(shifted) - 0x3f000000u;
  const U finite = magnitude < 0x38800000u ? subnormal : normal;
  const U infinite =
      magnitude > 0x7f800000u ? ((magnitude >> 13) & 0x3ffu) | 0x7e00u : (magnitude & 0u) | 0x7c00u;
  return (magnitude >= 0x47800000u ? infinite : finite) | ((bits >> 16) & 0x8000u);
}

// float8 e4m3fn: no infinities, 0x7f is NaN, the largest finite value is 448.
template <class F, class U>
ADACACHE_HD F float_of_float8_bits(U bits) {
  const U magnitude = (bits & 0x7fu) << 20;
  const F scaled = bit_cast<F>(magnitude) * 1329227995784915872903807060280344576.0f;  // 2^(127 - 7)
  const U finite_bits = bit_cast<U>(scaled);
  const U with_special = magnitude == 0x07f00000u ? magnitude | 0x7fc00000u : finite_bits;
  return bit_cast<F>(with_special | ((bits & 0x80u) << 24));
}

template <class F, class U>
ADACACHE_HD U float8_bits_of_float(F value) {
  const U bits = bit_cast<U>(value);
  const U magnitude = bits & 0x7fffffffu;
  const U normal = (magnitude + (((magnitude >> 20) & 1u) + 0xc407ffffu)) >> 20;
  // Adding 2^14 rounds to the spacing of float8 subnormals, 2^-9.
  const F shifted = bit_cast<F>(magnitude) + 16384.0f;
  const U subnormal = bit_cast<U>(shifted) - 0x46800000u;
  const U finite = magnitude < 0x3c800000u ? subnormal : normal;
  return (magnitude > 0x43e80000u ? (magnitude & 0u) | 0x7fu : finite) | ((bits >> 24) & 0x80u);
}

ADACACHE_HD float to_float(float value) { return value; }

ADACACHE_HD float to_float(float8_e4m3 value) { return float_of_float8_bits<float, uint32_t>(value.bits); }

ADACACHE_HD float to_float(bfloat16 value) { return float_of_bfloat16_bits<float, uint32_t>(value.bits); }

ADACACHE_HD float to_float(float16 value) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#else
  return float_of_float16_bits<float, uint32_t>(value.bits);
#endif
}

ADACACHE_HD void from_float(float value, float& result) { result = value; }

ADACACHE_HD void from_float(float value, bfloat16& result) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
#else
  result.bits = static_cast<uint16_t>(bfloat16_bits_of_float<float, uint32_t>(value));
#endif
}

ADACACHE_HD void from_float(float value, float16& result) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
#else
  result.bits = static_cast<uint16_t>(float16_bits_of_float<float, uint32_t>(value));
#endif
}

ADACACHE_HD void from_float(float value, float8_e4m3& result) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(value));
  result.bits = static_cast<uint8_t>(pair);
#else
  result.bits = static_cast<uint8_t>(float8_bits_of_float<float, uint32_t>(value));
#endif
}

// The value after a store as T and a load.
template <class T>
ADACACHE_HD float rounded(float value) {
  T stored;
  from_float(value, stored);
  return to_float(stored);
}

// Never contracted to a fused multiply-add: it skips one rounding, and x + gate * y would differ from the two
// operations of PyTorch.
ADACACHE_HD float multiply(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

ADACACHE_HD float add(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

// For results that need not be bit-identical across backends.
ADACACHE_HD float multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return a * b + c;
#endif
}

ADACACHE_HD float absolute(float value) {
#if defined(__CUDA_ARCH__)
  return __builtin_fabsf(value);  // an operand modifier of the following add
#else
  return bit_cast<float>(bit_cast<uint32_t>(value) & 0x7fffffffu);
#endif
}

}  // namespace ADACACHE_ISA

// Bytes per element.
ADACACHE_HD int64_t bytes_of(DType dtype) {
  return dtype == DType::float32 ? 4 : dtype == DType::float8_e4m3 ? 1 : 2;
}

// Calls function(T{}) with the element type of the dtype.
template <class Function>
void dispatch(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::float32:
      return function(float{});
    case DType::bfloat16:
      return function(bfloat16{});
    case DType::float16:
      return function(float16{});
    case DType::float8_e4m3:
      return;  // only kept residuals and norms may be float8; the checks reject it for other tensors
  }
}

}  // namespace adacache

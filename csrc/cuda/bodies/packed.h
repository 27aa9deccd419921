// SPDX-License-Identifier: Apache-2.0
// Vectors of contiguous elements for 16-byte memory accesses.
#pragma once

#if !defined(__CUDA_ARCH__)
#include <cassert>
#endif
#include <type_traits>

#include "../../core/numeric.h"

// UNROLL: for loops over registers, which need constant indices. NO_UNROLL: for rare loops, to limit code
// size.
#if defined(__CUDA_ARCH__)
#define ADACACHE_UNROLL _Pragma("unroll")
#define ADACACHE_NO_UNROLL _Pragma("unroll 1")
#else
#define ADACACHE_UNROLL
#define ADACACHE_NO_UNROLL
#endif

namespace adacache {
inline namespace ADACACHE_ISA {

template <class T, int width>
struct Packed {
  static constexpr int bytes = sizeof(T) * width;
  static constexpr int alignment = bytes < 16 ? bytes : 16;
  static constexpr int per_word = 4 / sizeof(T);
  static_assert(bytes % 4 == 0, "whole words");
  // Words, so that the compiler emits one 16-byte access instead of eight 2-byte ones.
  struct alignas(alignment) Words {
    uint32_t word[bytes / 4];
  } words;

  static ADACACHE_HD Packed load(const T* from) {
    Packed packed;
#if defined(__CUDA_ARCH__)
    packed.words = *reinterpret_cast<const Words*>(from);
#else
    assert(reinterpret_cast<uintptr_t>(from) % alignment == 0);
    memcpy(&packed.words, from, bytes);
#endif
    return packed;
  }

  ADACACHE_HD void store(T* to) const {
#if defined(__CUDA_ARCH__)
    // An assignment of Words may be split into stores of single words.
    ADACACHE_UNROLL
    for (int i = 0; i < bytes / 4; i += alignment / 4) store_words(reinterpret_cast<uint32_t*>(to) + i, i);
#else
    assert(reinterpret_cast<uintptr_t>(to) % alignment == 0);
    memcpy(to, &words, bytes);
#endif
  }

  // The first `count` elements, at any alignment. The others are 0, which is neutral in sums.
  static ADACACHE_HD Packed load(const T* from, int count) {
    float values[width];
    ADACACHE_UNROLL
    for (int i = 0; i < width; ++i) values[i] = i < count ? to_float(from[i]) : 0.0f;
    return of(values);
  }

  ADACACHE_HD void store(T* to, int count) const {
    ADACACHE_UNROLL
    for (int i = 0; i < width; ++i)
      if (i < count) to[i] = element(i);
  }

  ADACACHE_HD float get(int i) const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    if constexpr (std::is_same_v<T, float8_e4m3>) {
      uint32_t halves;  // float16 represents all float8 values exactly
      asm("cvt.rn.f16x2.e4m3x2 %0, %1;"
          : "=r"(halves)
          : "h"(static_cast<uint16_t>(words.word[i / 4] >> (i % 4 / 2 * 16))));
      return to_float(float16{static_cast<uint16_t>(halves >> (i % 2 * 16))});
    }
#endif
    return to_float(element(i));
  }

  // Rounded to T.
  static ADACACHE_HD Packed of(const float (&values)[width]) {
    Packed packed;
    ADACACHE_UNROLL
    for (int i = 0; i < bytes / 4; ++i) packed.words.word[i] = word_of(values + i * per_word);
    return packed;
  }

 private:
#if defined(__CUDA_ARCH__)
  // Stores the words of one access, from word `first` on.
  __device__ __forceinline__ void store_words(uint32_t* to, int first) const {
    const uint32_t* word = words.word + first;
    if constexpr (alignment == 16)
      asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(word[0]), "r"(word[1]),
                   "r"(word[2]), "r"(word[3])
                   : "memory");
    else if constexpr (alignment == 8)
      asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(word[0]), "r"(word[1]) : "memory");
    else
      asm volatile("st.global.u32 [%0], %1;" ::"l"(to), "r"(word[0]) : "memory");
  }
#endif

  ADACACHE_HD T element(int i) const {
    if constexpr (sizeof(T) == 4) {
      return bit_cast<T>(words.word[i]);
    } else {
      using Bits = decltype(T::bits);
      return T{static_cast<Bits>(words.word[i / per_word] >> (i % per_word * 8 * sizeof(T)))};
    }
  }

  static ADACACHE_HD uint32_t word_of(const float* values) {
#if defined(__CUDA_ARCH__)
    uint32_t word;
    if constexpr (std::is_same_v<T, bfloat16>) {
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(values[1]), "f"(values[0]));
      return word;
    } else if constexpr (std::is_same_v<T, float16>) {
      asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(values[1]), "f"(values[0]));
      return word;
    }
#if __CUDA_ARCH__ >= 890
    if constexpr (std::is_same_v<T, float8_e4m3>) {
      uint16_t low, high;
      asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(values[1]), "f"(values[0]));
      asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(values[3]), "f"(values[2]));
      return low | static_cast<uint32_t>(high) << 16;
    }
#endif
#endif
    uint32_t result = 0;
    ADACACHE_UNROLL
    for (int i = 0; i < per_word; ++i) {
      T stored;
      from_float(values[i], stored);
      if constexpr (sizeof(T) == 4)
        result = bit_cast<uint32_t>(stored);
      else
        result |= static_cast<uint32_t>(stored.bits) << (i * 8 * sizeof(T));
    }
    return result;
  }
};

// A single element, with the alignment of T.
template <class T>
struct Packed<T, 1> {
  T element;

  static ADACACHE_HD Packed load(const T* from) { return {*from}; }
  ADACACHE_HD void store(T* to) const { *to = element; }
  ADACACHE_HD float get(int) const { return to_float(element); }
  static ADACACHE_HD Packed of(const float (&values)[1]) {
    Packed packed;
    from_float(values[0], packed.element);
    return packed;
  }
};

// A kernel for elements of type T has modulators of type T and computes layer norms. One for General<T>
// chooses at run time: the dtype of each modulator, T or float32, and its table; where x + gate * y is
// rounded; the kind of norm.
template <class T>
struct General {};

template <class Element>
struct Elements {
  using Type = Element;       // of x
  using Modulator = Element;  // as it is held in registers
  static constexpr bool general = false;
};
template <class T>
struct Elements<General<T>> {
  using Type = T;
  using Modulator = float;
  static constexpr bool general = true;
};

// Elements per 16-byte access.
template <class T>
constexpr int vector_width = 16 / sizeof(T);
template <class T>
constexpr int vector_width<General<T>> = vector_width<T>;

// Tree sum in a fixed order.
template <int width>
ADACACHE_HD float sum_of(const float (&values)[width]) {
  float sums[width];
  ADACACHE_UNROLL
  for (int i = 0; i < width; ++i) sums[i] = values[i];
  ADACACHE_UNROLL
  for (int half = width / 2; half > 0; half /= 2) ADACACHE_UNROLL
  for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  return sums[0];
}

}  // namespace ADACACHE_ISA

inline int vector_width_of(DType dtype) { return static_cast<int>(16 / bytes_of(dtype)); }

// Whether vectors of `width` elements are aligned for this pointer and these strides.
template <class... Strides>
bool vectors_are_aligned(const void* data, DType dtype, int width, Strides... strides) {
  const int64_t bytes = width * bytes_of(dtype);
  const int64_t alignment = bytes < 16 ? bytes : 16;
  return reinterpret_cast<uintptr_t>(data) % alignment == 0 && ((strides % width == 0) && ...);
}

}  // namespace adacache

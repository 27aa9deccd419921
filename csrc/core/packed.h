// Neighbouring elements that travel in one memory access, for the device bodies.
#pragma once

#if !defined(__CUDA_ARCH__)
#include <cassert>
#endif

#include "numeric.h"

namespace adacache {
inline namespace ADACACHE_ISA {

template <class T, int width>
struct Packed {
  static constexpr int bytes = sizeof(T) * width;
  static constexpr int alignment = bytes < 16 ? bytes : 16;
  // Words, so that the compiler sees one 16-byte access and not eight of two bytes.
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
    *reinterpret_cast<Words*>(to) = words;
#else
    assert(reinterpret_cast<uintptr_t>(to) % alignment == 0);
    memcpy(to, &words, bytes);
#endif
  }

  ADACACHE_HD float get(int i) const {
    if constexpr (sizeof(T) == 4) {
      return bit_cast<float>(words.word[i]);
    } else {
      return to_float(T{static_cast<uint16_t>(words.word[i / 2] >> (i % 2 * 16))});
    }
  }

  ADACACHE_HD void set(int i, float value) {
    T stored;
    from_float(value, stored);
    if constexpr (sizeof(T) == 4) {
      words.word[i] = bit_cast<uint32_t>(stored);
    } else if (i % 2 == 0) {
      words.word[i / 2] = stored.bits;
    } else {
      words.word[i / 2] |= static_cast<uint32_t>(stored.bits) << 16;
    }
  }
};

// A single element: any alignment that the type itself has.
template <class T>
struct Packed<T, 1> {
  T element;

  static ADACACHE_HD Packed load(const T* from) { return {*from}; }
  ADACACHE_HD void store(T* to) const { *to = element; }
  ADACACHE_HD float get(int) const { return to_float(element); }
  ADACACHE_HD void set(int, float value) { from_float(value, element); }
};

// Elements per 16-byte access.
template <class T>
constexpr int vector_width = 16 / sizeof(T);

}  // namespace ADACACHE_ISA

// Whether every access of `width` elements at this pointer and these strides starts at a multiple of 16
// bytes.
template <class... Strides>
bool vectors_are_aligned(const void* data, int width, Strides... strides) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && ((strides % width == 0) && ...);
}

}  // namespace adacache

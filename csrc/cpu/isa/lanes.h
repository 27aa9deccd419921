// SPDX-License-Identifier: Apache-2.0
// 16 float32 lanes, in one or more vector registers. The lane count is the same for every instruction set,
// and lanes are reduced only at the end of a row, so that results are bit-identical across instruction sets.
#pragma once

#include <cstddef>

#include "../../core/numeric.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace adacache {
inline namespace ADACACHE_ISA {

#if defined(__AVX512F__)
constexpr int register_lanes = 16;
#elif defined(__AVX2__)
constexpr int register_lanes = 8;
#else
constexpr int register_lanes = 4;
#endif
constexpr int lane_count = 16;
constexpr int registers = lane_count / register_lanes;

typedef float FloatRegister __attribute__((vector_size(4 * register_lanes)));
typedef uint32_t WordRegister __attribute__((vector_size(4 * register_lanes)));
typedef uint16_t HalfRegister __attribute__((vector_size(2 * register_lanes)));
typedef uint8_t ByteRegister __attribute__((vector_size(register_lanes)));

struct Lanes {
  FloatRegister part[registers] = {};

  friend Lanes operator+(Lanes a, Lanes b) {
    for (int i = 0; i < registers; ++i) a.part[i] += b.part[i];
    return a;
  }
  friend Lanes operator-(Lanes a, Lanes b) {
    for (int i = 0; i < registers; ++i) a.part[i] -= b.part[i];
    return a;
  }
  friend Lanes operator*(Lanes a, Lanes b) {
    for (int i = 0; i < registers; ++i) a.part[i] *= b.part[i];
    return a;
  }
};

inline Lanes lanes_of(float value) {
  Lanes lanes;
  for (int i = 0; i < registers; ++i)
    lanes.part[i] = value - FloatRegister{};  // a sum would lose the sign of -0
  return lanes;
}

inline Lanes multiply(Lanes a, Lanes b) { return a * b; }

inline Lanes add(Lanes a, Lanes b) { return a + b; }

inline Lanes absolute(Lanes a) {
  for (int i = 0; i < registers; ++i)
    a.part[i] = bit_cast<FloatRegister>(bit_cast<WordRegister>(a.part[i]) & 0x7fffffffu);
  return a;
}

// Conversions between words and their lower bits. Intrinsics where compilers would split the vectors.
inline WordRegister widen_bits(HalfRegister bits) {
#if defined(__AVX512F__)
  return bit_cast<WordRegister>(_mm512_cvtepu16_epi32(bit_cast<__m256i>(bits)));
#elif defined(__AVX2__)
  return bit_cast<WordRegister>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(bits)));
#else
  return __builtin_convertvector(bits, WordRegister);
#endif
}

inline WordRegister widen_bits(ByteRegister bits) {
#if defined(__AVX512F__)
  return bit_cast<WordRegister>(_mm512_cvtepu8_epi32(bit_cast<__m128i>(bits)));
#elif defined(__AVX2__)
  return bit_cast<WordRegister>(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bit_cast<long long>(bits))));
#else
  return __builtin_convertvector(bits, WordRegister);
#endif
}

// The words are smaller than 2^16, or 2^8.
template <class Stored>
inline Stored narrow_bits(WordRegister words) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Stored) == 32)
    return bit_cast<Stored>(_mm512_cvtepi32_epi16(bit_cast<__m512i>(words)));
  else
    return bit_cast<Stored>(_mm512_cvtepi32_epi8(bit_cast<__m512i>(words)));
#elif defined(__AVX2__)
  const __m256i all = bit_cast<__m256i>(words);
  const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  if constexpr (sizeof(Stored) == 16)
    return bit_cast<Stored>(halves);
  else
    return bit_cast<Stored>(static_cast<long long>(_mm_cvtsi128_si64(_mm_packus_epi16(halves, halves))));
#else
  return __builtin_convertvector(words, Stored);
#endif
}

// A register of values in the storage format, and the same values as floats.
template <class Stored>
struct RoundedRegister {
  Stored stored;
  FloatRegister value;
};

template <class T>
struct Format;

template <>
struct Format<float> {
  typedef FloatRegister Stored;
  static FloatRegister widen(Stored stored) { return stored; }
  static RoundedRegister<Stored> round(FloatRegister value) { return {value, value}; }
};

template <>
struct Format<bfloat16> {
  typedef HalfRegister Stored;
  static FloatRegister widen(Stored stored) {
    return float_of_bfloat16_bits<FloatRegister>(widen_bits(stored));
  }
  static RoundedRegister<Stored> round(FloatRegister value) {
    const WordRegister bits = float_bits_rounded_to_bfloat16<FloatRegister, WordRegister>(value);
    return {narrow_bits<Stored>(bits >> 16), bit_cast<FloatRegister>(bits & 0xffff0000u)};
  }
};

template <>
struct Format<float16> {
  typedef HalfRegister Stored;
  static FloatRegister widen(Stored stored) {
#if defined(__AVX512F__)
    return bit_cast<FloatRegister>(_mm512_cvtph_ps(bit_cast<__m256i>(stored)));
#elif defined(__AVX2__) && defined(__F16C__)
    return bit_cast<FloatRegister>(_mm256_cvtph_ps(bit_cast<__m128i>(stored)));
#else
    return float_of_float16_bits<FloatRegister>(widen_bits(stored));
#endif
  }
  static RoundedRegister<Stored> round(FloatRegister value) {
#if defined(__AVX512F__)
    const Stored stored = bit_cast<Stored>(
        _mm512_cvtps_ph(bit_cast<__m512>(value), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__) && defined(__F16C__)
    const Stored stored =
        bit_cast<Stored>(_mm256_cvtps_ph(bit_cast<__m256>(value), _MM_FROUND_TO_NEAREST_INT));
#else
    const Stored stored = narrow_bits<Stored>(float16_bits_of_float<FloatRegister, WordRegister>(value));
#endif
    return {stored, widen(stored)};
  }
};

template <>
struct Format<float8_e4m3> {
  typedef ByteRegister Stored;
  static FloatRegister widen(Stored stored) {
    return float_of_float8_bits<FloatRegister>(widen_bits(stored));
  }
  static RoundedRegister<Stored> round(FloatRegister value) {
    const Stored stored = narrow_bits<Stored>(float8_bits_of_float<FloatRegister, WordRegister>(value));
    return {stored, widen(stored)};
  }
};

// 16 values in the storage format.
template <class T>
struct StoredLanes {
  typename Format<T>::Stored part[registers];
};

// One copy per register: compilers may split a larger one into narrower stores, which prevents store
// forwarding.
template <class T>
inline StoredLanes<T> load(const T* from) {
  StoredLanes<T> stored;
  for (int i = 0; i < registers; ++i)
    memcpy(&stored.part[i], from + i * register_lanes, sizeof(stored.part[i]));
  return stored;
}

// The first `count` values; the other lanes are 0, which is neutral in sums.
template <class T>
inline StoredLanes<T> load(const T* from, int64_t count) {
  StoredLanes<T> stored{};
  memcpy(&stored, from, count * sizeof(T));
  return stored;
}

template <class T>
inline void store(T* to, const StoredLanes<T>& stored) {
  for (int i = 0; i < registers; ++i)
    memcpy(to + i * register_lanes, &stored.part[i], sizeof(stored.part[i]));
}

inline void store(float* to, const Lanes& lanes) {
  for (int i = 0; i < registers; ++i) memcpy(to + i * register_lanes, &lanes.part[i], sizeof(lanes.part[i]));
}

template <class T>
inline void store(T* to, const StoredLanes<T>& stored, int64_t count) {
  memcpy(to, &stored, count * sizeof(T));
}

// Non-temporal stores, which avoid the read for ownership. Rows are aligned to 64 bytes.
template <class T>
inline void store_streaming(T* to, const StoredLanes<T>& stored) {
#if defined(__SSE2__)
  for (int i = 0; i < registers; ++i) {
    T* part = to + i * register_lanes;
#if defined(__AVX512F__)
    if constexpr (sizeof(stored.part[i]) == 64)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(part), bit_cast<__m512i>(stored.part[i]));
#endif
#if defined(__AVX2__)
    if constexpr (sizeof(stored.part[i]) == 32)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(part), bit_cast<__m256i>(stored.part[i]));
#endif
    if constexpr (sizeof(stored.part[i]) == 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(part), bit_cast<__m128i>(stored.part[i]));
    if constexpr (sizeof(stored.part[i]) == 8)
      _mm_stream_si64(reinterpret_cast<long long*>(part), bit_cast<long long>(stored.part[i]));
    if constexpr (sizeof(stored.part[i]) == 4)
      _mm_stream_si32(reinterpret_cast<int*>(part), bit_cast<int>(stored.part[i]));
  }
#else
  store(to, stored);
#endif
}

// Orders streaming stores before later stores. Required before another thread reads the output.
inline void finish_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <class T>
inline Lanes widen(const StoredLanes<T>& stored) {
  Lanes lanes;
  for (int i = 0; i < registers; ++i) lanes.part[i] = Format<T>::widen(stored.part[i]);
  return lanes;
}

// Values rounded to T, in the storage format and as floats.
template <class T>
struct RoundedLanes {
  StoredLanes<T> stored;
  Lanes value;
};

template <class T>
inline RoundedLanes<T> round(const Lanes& lanes) {
  RoundedLanes<T> rounded;
  for (int i = 0; i < registers; ++i) {
    const auto part = Format<T>::round(lanes.part[i]);
    rounded.stored.part[i] = part.stored;
    rounded.value.part[i] = part.value;
  }
  return rounded;
}

// Tree reduction of 16 lanes, in the same order for every instruction set. join(a, b) accumulates b in a.
template <class Lane, class Sixteen, class Join>
inline Lane joined_lanes(const Sixteen& lanes, const Join& join) {
  typedef Lane Eight __attribute__((vector_size(8 * sizeof(Lane))));
  typedef Lane Four __attribute__((vector_size(4 * sizeof(Lane))));
  struct Eights {
    Eight half[2];
  } eights = bit_cast<Eights>(lanes);
  join(eights.half[0], eights.half[1]);
  struct Fours {
    Four half[2];
  } fours = bit_cast<Fours>(eights.half[0]);
  join(fours.half[0], fours.half[1]);
  Lane lane[4];
  memcpy(lane, &fours.half[0], sizeof(lane));
  join(lane[0], lane[2]);
  join(lane[1], lane[3]);
  join(lane[0], lane[1]);
  return lane[0];
}

inline float total(const Lanes& lanes) {
  return joined_lanes<float>(lanes, [](auto& a, const auto& b) { a += b; });
}

// The largest magnitude. The integer comparison propagates NaN, which orders above infinity.
struct LargestMagnitude {
  struct Words {
    WordRegister part[registers] = {};
  } words;

  void gather(const Lanes& lanes) {
    for (int i = 0; i < registers; ++i) {
      const WordRegister magnitude = bit_cast<WordRegister>(lanes.part[i]) & 0x7fffffffu;
      words.part[i] = magnitude > words.part[i] ? magnitude : words.part[i];
    }
  }
  float largest() const {
    return bit_cast<float>(joined_lanes<uint32_t>(words, [](auto& a, const auto& b) { a = a > b ? a : b; }));
  }
};

// Float64 sums per lane. Each gathers float32 sums over at most one token.
struct WideLanes {
  double lane[lane_count] = {};

  void gather(const Lanes& lanes) {
    float values[lane_count];
    memcpy(values, &lanes, sizeof(values));
    for (int i = 0; i < lane_count; ++i) lane[i] += values[i];
  }
  void gather(const WideLanes& other, int weight) {
    for (int i = 0; i < lane_count; ++i) lane[i] += weight * other.lane[i];
  }
  double total() const {
    double sum = 0;
    for (int i = 0; i < lane_count; ++i) sum += lane[i];
    return sum;
  }
};

}  // namespace ADACACHE_ISA
}  // namespace adacache

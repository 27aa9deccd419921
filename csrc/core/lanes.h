// Sixteen float32 lanes on any CPU, made of whatever vector registers it has. The lane count is the same
// everywhere and lanes never mix until a row is finished, so that every instruction set gives the same bits.
#pragma once

#include <cstddef>

#include "numeric.h"

#if defined(__F16C__)
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
  for (int i = 0; i < registers; ++i) lanes.part[i] = FloatRegister{} + value;
  return lanes;
}

inline Lanes multiply(Lanes a, Lanes b) { return a * b; }

inline Lanes add(Lanes a, Lanes b) { return a + b; }

inline Lanes absolute(Lanes a) {
  for (int i = 0; i < registers; ++i)
    a.part[i] = bit_cast<FloatRegister>(bit_cast<WordRegister>(a.part[i]) & 0x7fffffffu);
  return a;
}

template <class T>
struct Format;

template <>
struct Format<float> {
  typedef FloatRegister Stored;
  static FloatRegister widen(Stored stored) { return stored; }
  static Stored narrow(FloatRegister value) { return value; }
};

template <>
struct Format<bfloat16> {
  typedef HalfRegister Stored;
  static FloatRegister widen(Stored stored) {
    return float_of_bfloat16_bits<FloatRegister>(__builtin_convertvector(stored, WordRegister));
  }
  static Stored narrow(FloatRegister value) {
    return __builtin_convertvector((bfloat16_bits_of_float<FloatRegister, WordRegister>(value)),
                                   HalfRegister);
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
    return float_of_float16_bits<FloatRegister>(__builtin_convertvector(stored, WordRegister));
#endif
  }
  static Stored narrow(FloatRegister value) {
#if defined(__AVX512F__)
    return bit_cast<Stored>(
        _mm512_cvtps_ph(bit_cast<__m512>(value), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__) && defined(__F16C__)
    return bit_cast<Stored>(_mm256_cvtps_ph(bit_cast<__m256>(value), _MM_FROUND_TO_NEAREST_INT));
#else
    return __builtin_convertvector((float16_bits_of_float<FloatRegister, WordRegister>(value)), HalfRegister);
#endif
  }
};

template <>
struct Format<float8_e4m3> {
  typedef ByteRegister Stored;
  static FloatRegister widen(Stored stored) {
    return float_of_float8_bits<FloatRegister>(__builtin_convertvector(stored, WordRegister));
  }
  static Stored narrow(FloatRegister value) {
    return __builtin_convertvector((float8_bits_of_float<FloatRegister, WordRegister>(value)), ByteRegister);
  }
};

// Sixteen values in their storage format: what is loaded and stored.
template <class T>
struct StoredLanes {
  typename Format<T>::Stored part[registers];
};

template <class T>
inline StoredLanes<T> load(const T* from) {
  StoredLanes<T> stored;
  memcpy(&stored, from, sizeof(stored));
  return stored;
}

// The last channels of a row; the lanes past them are 0 and so add nothing to any sum.
template <class T>
inline StoredLanes<T> load(const T* from, int64_t count) {
  StoredLanes<T> stored{};
  memcpy(&stored, from, count * sizeof(T));
  return stored;
}

template <class T>
inline void store(T* to, const StoredLanes<T>& stored) {
  memcpy(to, &stored, sizeof(stored));
}

template <class T>
inline void store(T* to, const StoredLanes<T>& stored, int64_t count) {
  memcpy(to, &stored, count * sizeof(T));
}

// Past the caches: memory that is written once and read much later need not be read first. `to` is aligned to
// 64 bytes at the start of its row.
template <class T>
inline void store_streaming(T* to, const StoredLanes<T>& stored) {
#if defined(__AVX512F__)
  if constexpr (sizeof(stored) == 64)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), bit_cast<__m512i>(stored));
  else
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), bit_cast<__m256i>(stored));
#elif defined(__SSE2__)
  struct Sixteen {
    __m128i part[sizeof(stored) / 16];
  };
  const Sixteen words = bit_cast<Sixteen>(stored);
  for (size_t i = 0; i < sizeof(stored) / 16; ++i)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to) + i, words.part[i]);
#else
  store(to, stored);
#endif
}

// Streaming stores are not ordered with the rest: to be called before another thread may look.
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

template <class T>
inline StoredLanes<T> narrow(const Lanes& lanes) {
  StoredLanes<T> stored;
  for (int i = 0; i < registers; ++i) stored.part[i] = Format<T>::narrow(lanes.part[i]);
  return stored;
}

// The sum of the lanes, in the same order on every instruction set.
inline float total(const Lanes& lanes) {
  float lane[lane_count];
  memcpy(lane, &lanes, sizeof(lane));
  for (int half = lane_count / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}

// The largest magnitude. Compared as integers, NaN is larger than infinity and so is not lost.
struct LargestMagnitude {
  WordRegister part[registers] = {};

  void gather(const Lanes& lanes) {
    for (int i = 0; i < registers; ++i) {
      const WordRegister magnitude = bit_cast<WordRegister>(lanes.part[i]) & 0x7fffffffu;
      part[i] = magnitude > part[i] ? magnitude : part[i];
    }
  }
  float largest() const {
    uint32_t lane[lane_count];
    memcpy(lane, part, sizeof(lane));
    uint32_t found = 0;
    for (int i = 0; i < lane_count; ++i) found = lane[i] > found ? lane[i] : found;
    return bit_cast<float>(found);
  }
};

// Float64 sums of lanes: float32 runs are short, one token long, and are gathered here.
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

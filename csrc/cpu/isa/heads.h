// SPDX-License-Identifier: Apache-2.0
// Heads of 16 tokens at a time, one token per lane: gather, RMS norm, rotary embedding, scatter.
#pragma once

#include "../attention.h"
#include "tokens.h"

namespace adacache::cpu {
inline namespace ADACACHE_ISA {

constexpr int quads_per_register = register_lanes / 4;

inline int64_t rounded_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

inline Lanes load_lanes(const float* from) { return widen(load(from)); }

inline void store_lanes(float* to, const Lanes& lanes) { store(to, round<float>(lanes).stored); }

inline Lanes times(Lanes a, float factor) {
  for (int i = 0; i < registers; ++i) a.part[i] *= factor;
  return a;
}

template <int... index>
inline FloatRegister shuffled(FloatRegister a, FloatRegister b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, index...);
#else
  return __builtin_shuffle(a, b, WordRegister{index...});
#endif
}

// Interleaves the lower (or upper) two lanes of each group of four of a and b, like unpcklps (unpckhps).
inline FloatRegister interleaved_lower(FloatRegister a, FloatRegister b) {
  if constexpr (register_lanes == 16)
    return shuffled<0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29>(a, b);
  else if constexpr (register_lanes == 8)
    return shuffled<0, 8, 1, 9, 4, 12, 5, 13>(a, b);
  else
    return shuffled<0, 4, 1, 5>(a, b);
}

inline FloatRegister interleaved_upper(FloatRegister a, FloatRegister b) {
  if constexpr (register_lanes == 16)
    return shuffled<2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31>(a, b);
  else if constexpr (register_lanes == 8)
    return shuffled<2, 10, 3, 11, 6, 14, 7, 15>(a, b);
  else
    return shuffled<2, 6, 3, 7>(a, b);
}

// Transposes the 4 x 4 tiles formed by each group of four lanes in four registers.
inline void transpose_quads(FloatRegister (&a)[4]) {
  const FloatRegister lower02 = interleaved_lower(a[0], a[2]), upper02 = interleaved_upper(a[0], a[2]);
  const FloatRegister lower13 = interleaved_lower(a[1], a[3]), upper13 = interleaved_upper(a[1], a[3]);
  a[0] = interleaved_lower(lower02, lower13);
  a[1] = interleaved_upper(lower02, lower13);
  a[2] = interleaved_lower(upper02, upper13);
  a[3] = interleaved_upper(upper02, upper13);
}

// Four contiguous values from each of several rows, `distance` apart.
inline FloatRegister load_quads(const float* from, int64_t distance) {
#if defined(__AVX512F__)
  __m512 quads = _mm512_castps128_ps512(_mm_loadu_ps(from));
  quads = _mm512_insertf32x4(quads, _mm_loadu_ps(from + distance), 1);
  quads = _mm512_insertf32x4(quads, _mm_loadu_ps(from + 2 * distance), 2);
  return bit_cast<FloatRegister>(_mm512_insertf32x4(quads, _mm_loadu_ps(from + 3 * distance), 3));
#elif defined(__AVX2__)
  const __m256 first = _mm256_castps128_ps256(_mm_loadu_ps(from));
  return bit_cast<FloatRegister>(_mm256_insertf128_ps(first, _mm_loadu_ps(from + distance), 1));
#else
  (void)distance;
  FloatRegister quads;
  memcpy(&quads, from, sizeof(quads));
  return quads;
#endif
}

inline void store_quads(float* to, int64_t distance, FloatRegister quads) {
  for (int i = 0; i < quads_per_register; ++i)
    memcpy(to + i * distance, reinterpret_cast<const char*>(&quads) + 16 * i, 16);
}

// Transposes rows [16][stride] to lanes [width, padded to a multiple of 4][16].
inline void lanes_of_rows(const float* rows, int64_t stride, int64_t width, float* lanes) {
  for (int64_t d = 0; d < width; d += 4)
    for (int part = 0; part < registers; ++part) {
      const float* from = rows + part * register_lanes * stride + d;
      FloatRegister quads[4];
      for (int i = 0; i < 4; ++i) quads[i] = load_quads(from + i * stride, 4 * stride);
      transpose_quads(quads);
      for (int i = 0; i < 4; ++i)
        memcpy(lanes + (d + i) * lane_count + part * register_lanes, &quads[i], sizeof(quads[i]));
    }
}

// The inverse of lanes_of_rows.
inline void rows_of_lanes(const float* lanes, int64_t width, int64_t stride, float* rows) {
  for (int64_t d = 0; d < width; d += 4)
    for (int part = 0; part < registers; ++part) {
      FloatRegister quads[4];
      for (int i = 0; i < 4; ++i)
        memcpy(&quads[i], lanes + (d + i) * lane_count + part * register_lanes, sizeof(quads[i]));
      transpose_quads(quads);
      float* to = rows + part * register_lanes * stride + d;
      for (int i = 0; i < 4; ++i) store_quads(to + i * stride, 4 * stride, quads[i]);
    }
}

// Calls body(d, count) for 16 values at a time. If the width is not a multiple of 16, the last group overlaps
// the one before, because whole registers are much faster than partial ones.
template <class Body>
ADACACHE_INLINE void for_each_sixteen_overlapping(int64_t width, const Body& body) {
  if (width < lane_count) {
    if (width > 0) body(int64_t{0}, width);
    return;
  }
  int64_t d = 0;
  for (; d + lane_count <= width; d += lane_count) body(d, int64_t{lane_count});
  if (d < width) body(width - lane_count, int64_t{lane_count});
}

// `to` is padded to a multiple of 16. Prefetches the next head: hardware prefetchers do not follow the stride
// between tokens.
template <class T>
inline void widen_row(const T* from, int64_t width, float* to) {
  for_each_sixteen_overlapping(width, [&](int64_t d, int64_t count) {
    __builtin_prefetch(from + width + d);
    store_lanes(to + d, widen(load_part(from + d, count)));
  });
}

template <class T>
inline void narrow_row(const float* from, int64_t width, T* to) {
  for_each_sixteen_overlapping(width, [&](int64_t d, int64_t count) {
    store_part(to + d, round<T>(load_lanes(from + d)).stored, count);
  });
}

// Gathers up to 16 rows of `width` values, `distance` apart, to lanes [width, padded to a multiple of 4][16].
// Lanes without a row are 0.
template <class T>
inline void gather_lanes(const T* from, int64_t distance, int64_t count, int64_t width, float* rows,
                         float* lanes) {
  const int64_t stride = rounded_up(width, lane_count);
  for (int64_t i = 0; i < count; ++i) widen_row(from + i * distance, width, rows + i * stride);
  memset(rows + count * stride, 0, (lane_count - count) * stride * sizeof(float));
  lanes_of_rows(rows, stride, width, lanes);
}

inline Lanes square_root(Lanes a) {
  for (int i = 0; i < registers; ++i)
#if defined(__AVX512F__)
    a.part[i] = bit_cast<FloatRegister>(_mm512_sqrt_ps(bit_cast<__m512>(a.part[i])));
#elif defined(__AVX2__)
    a.part[i] = bit_cast<FloatRegister>(_mm256_sqrt_ps(bit_cast<__m256>(a.part[i])));
#elif defined(__SSE2__)
    a.part[i] = bit_cast<FloatRegister>(_mm_sqrt_ps(bit_cast<__m128>(a.part[i])));
#else
    for (int j = 0; j < register_lanes; ++j) a.part[i][j] = __builtin_sqrtf(a.part[i][j]);
#endif
  return a;
}

inline Lanes reciprocal(Lanes a) {
  for (int i = 0; i < registers; ++i) a.part[i] = 1.0f / a.part[i];
  return a;
}

// x [dim][16] *= rsqrt(mean(x^2) + eps) * weight, per token.
inline void normalise(float* x, int64_t dim, const float* weight, float eps) {
  // Four accumulators hide the latency of the additions.
  Lanes sums[4];
  int64_t d = 0;
  for (; d + 4 <= dim; d += 4)
    for (int i = 0; i < 4; ++i) {
      const Lanes value = load_lanes(x + (d + i) * lane_count);
      sums[i] = sums[i] + value * value;
    }
  for (; d < dim; ++d) {
    const Lanes value = load_lanes(x + d * lane_count);
    sums[0] = sums[0] + value * value;
  }
  Lanes mean = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  for (int i = 0; i < registers; ++i) mean.part[i] = mean.part[i] / static_cast<float>(dim) + eps;
  const Lanes factor = reciprocal(square_root(mean));
  for (d = 0; d < dim; ++d)
    store_lanes(x + d * lane_count, times(load_lanes(x + d * lane_count) * factor, weight[d]));
}

// Rotates the channel pairs of x [dim][16] by the angles [dim / 2][16].
inline void rotate(float* x, int64_t dim, bool interleaved, const float* cos, const float* sin) {
  const int64_t first_step = interleaved ? 2 : 1;
  float* second = x + (interleaved ? 1 : dim / 2) * lane_count;
  for (int64_t i = 0; i < dim / 2; ++i) {
    float* at_a = x + i * first_step * lane_count;
    float* at_b = second + i * first_step * lane_count;
    const Lanes a = load_lanes(at_a), b = load_lanes(at_b);
    const Lanes c = load_lanes(cos + i * lane_count), s = load_lanes(sin + i * lane_count);
    store_lanes(at_a, a * c - b * s);
    store_lanes(at_b, a * s + b * c);
  }
}

inline void norm_and_rope(float* x, int64_t dim, const NormRope& p, const float* weight, const float* cos,
                          const float* sin) {
  if (p.q_weight != nullptr) normalise(x, dim, weight, p.eps);
  if (p.cos != nullptr) rotate(x, dim, p.interleaved, cos, sin);
}

template <class T>
inline void widen_weights(const NormRope& p, int64_t dim, const AttentionScratch& scratch) {
  if (p.q_weight == nullptr) return;
  widen_row(static_cast<const T*>(p.q_weight), dim, scratch.q_weight);
  widen_row(static_cast<const T*>(p.k_weight), dim, scratch.k_weight);
}

// Gathers the angles of up to 16 tokens n = first + i * distance.
inline void gather_angles(const NormRope& p, int64_t dim, int64_t first, int64_t distance, int64_t count,
                          const AttentionScratch& scratch, float* cos, float* sin) {
  const int64_t pairs = dim / 2, stride = rounded_up(pairs, lane_count);
  const float* const from[2] = {p.cos, p.sin};
  float* const to[2] = {cos, sin};
  for (int table = 0; table < 2; ++table) {
    for (int64_t i = 0; i < count; ++i)
      widen_row(from[table] + (first + i * distance) / p.tokens_per_angle * pairs, pairs,
                scratch.rows + i * stride);
    memset(scratch.rows + count * stride, 0, (lane_count - count) * stride * sizeof(float));
    lanes_of_rows(scratch.rows, stride, pairs, to[table]);
  }
}

}  // namespace ADACACHE_ISA
}  // namespace adacache::cpu

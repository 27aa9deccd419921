// SPDX-License-Identifier: Apache-2.0
// temporal_attention.
#pragma once

#include "heads.h"

namespace adacache::cpu {
inline namespace ADACACHE_ISA {

// exp(x) for x <= 0, with an error of about 1 ulp; 0 below 2^-125.
inline Lanes exponential(Lanes x) {
  // x = n ln 2 + r, |r| <= ln(2) / 2. Adding 1.5 * 2^23 rounds to the integer n, in the lowest bits. ln2_high
  // has few significant bits, so that n * ln2_high is exact.
  constexpr float log2_of_e = 1.44269504f, to_integer = 12582912.0f;
  constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  for (int i = 0; i < registers; ++i) {
    const FloatRegister shifted = x.part[i] * log2_of_e + to_integer;
    const FloatRegister n = shifted - to_integer;
    const FloatRegister r = (x.part[i] - n * ln2_high) - n * ln2_low;
    // Taylor series; truncation error below 6e-9.
    FloatRegister sum = r * (1 / 5040.0f) + 1 / 720.0f;
    sum = sum * r + 1 / 120.0f;
    sum = sum * r + 1 / 24.0f;
    sum = sum * r + 1 / 6.0f;
    sum = sum * r + 0.5f;
    sum = (sum * r) * r + r;
    sum = sum + 1.0f;
    const WordRegister power = (bit_cast<WordRegister>(shifted) << 23) + 0x3f800000u;
    const FloatRegister zero{};
    x.part[i] = x.part[i] < -86.6f ? zero : sum * bit_cast<FloatRegister>(power);
  }
  return x;
}

inline Lanes larger(Lanes a, Lanes b) {
  for (int i = 0; i < registers; ++i) a.part[i] = a.part[i] > b.part[i] ? a.part[i] : b.part[i];
  return a;
}

// Rows of a product whose accumulators fit the vector registers. Divides 16.
constexpr int product_rows = register_lanes == 16 ? 8 : register_lanes == 8 ? 4 : 2;

// sums[r] = sum over i of factors[i][r] * lanes[i], in the order of i, in short runs to limit the rounding
// error of wide heads.
ADACACHE_INLINE void multiply_rows(int64_t count, const float* factors, int64_t factor_stride,
                                   const float* lanes, int64_t lanes_stride, Lanes (&sums)[product_rows]) {
  constexpr int64_t run_length = 32;
  for (int r = 0; r < product_rows; ++r) sums[r] = Lanes{};
  for (int64_t first = 0; first < count; first += run_length) {
    const int64_t last = first + run_length < count ? first + run_length : count;
    Lanes run[product_rows];
    for (int64_t i = first; i < last; ++i) {
      const Lanes value = load_lanes(lanes + i * lanes_stride);
      for (int r = 0; r < product_rows; ++r) run[r] = run[r] + times(value, factors[i * factor_stride + r]);
    }
    for (int r = 0; r < product_rows; ++r) sums[r] = sums[r] + run[r];
  }
}

// scores [keys][16 queries] -> exp(scale * score - max over keys), and 1 / sum over keys, per query.
inline void softmax(float* scores, int64_t keys, float scale, float* inverse_sums) {
  Lanes largest;
  for (int64_t j = 0; j < keys; ++j) {
    const Lanes score = times(load_lanes(scores + j * lane_count), scale);
    store_lanes(scores + j * lane_count, score);
    largest = j == 0 ? score : larger(largest, score);
  }
  Lanes sum;
  for (int64_t j = 0; j < keys; ++j) {
    const Lanes weight = exponential(load_lanes(scores + j * lane_count) - largest);
    store_lanes(scores + j * lane_count, weight);
    sum = sum + weight;
  }
  store_lanes(inverse_sums, reciprocal(sum));
}

// One head of one place. q, k [chunks][dim][16] and v [frames][stride] are in scratch memory; `out` points to
// frame 0.
template <class T>
void attend(const TemporalAttention& p, const AttentionScratch& scratch, int64_t chunk_size, T* out) {
  const int64_t dim = p.shape.dim, frames = p.frames, stride = rounded_up(dim, lane_count);
  for (int64_t first_query = 0; first_query < frames; first_query += lane_count) {
    const float* q = scratch.q + first_query / lane_count * chunk_size;
    const int64_t queries = frames - first_query < lane_count ? frames - first_query : lane_count;
    Lanes sums[product_rows];
    for (int64_t j = 0; j < frames; j += product_rows) {
      const float* k = scratch.k + j / lane_count * chunk_size + j % lane_count;
      multiply_rows(dim, k, lane_count, q, lane_count, sums);
      for (int r = 0; r < product_rows; ++r) store_lanes(scratch.scores + (j + r) * lane_count, sums[r]);
    }
    float inverse_sums[lane_count];
    softmax(scratch.scores, frames, p.scale, inverse_sums);
    for (int64_t i = 0; i < queries; i += product_rows) {
      const int64_t left = queries - i;
      T* to = out + (first_query + i) * p.places * p.out_strides.token;
      for_each_sixteen_overlapping(dim, [&](int64_t d, int64_t count) {
        multiply_rows(frames, scratch.scores + i, lane_count, scratch.v + d, stride, sums);
        for (int r = 0; r < product_rows; ++r) {
          if (r >= left) break;
          store_part(to + r * p.places * p.out_strides.token + d,
                     round<T>(times(sums[r], inverse_sums[i + r])).stored, count);
        }
      });
    }
  }
}

template <class T>
void temporal_attention_places(const TemporalAttention& p, const AttentionUnit& unit) {
  const AttentionScratch& scratch = unit.scratch;
  const int64_t dim = p.shape.dim, heads = p.shape.heads, stride = rounded_up(dim, lane_count);
  const int64_t frame_distance = p.places * p.qkv_strides.token;
  const int64_t chunk_size = rounded_up(dim, 4) * lane_count;
  const int64_t angles_size = rounded_up(dim / 2, 4) * lane_count;
  widen_weights<T>(p.norm_rope, dim, scratch);
  for (int64_t place = unit.first; place < unit.last; ++place) {
    // Angles per frame are the same for all places.
    if (p.norm_rope.cos != nullptr && (place == unit.first || p.norm_rope.tokens_per_angle == 1))
      for (int64_t frame = 0; frame < p.frames; frame += lane_count) {
        const int64_t count = p.frames - frame < lane_count ? p.frames - frame : lane_count;
        const int64_t offset = frame / lane_count * angles_size;
        gather_angles(p.norm_rope, dim, frame * p.places + place, p.places, count, scratch,
                      scratch.cos + offset, scratch.sin + offset);
      }
    const T* token = token_of<T>(p.qkv, p.qkv_strides, unit.row, place);
    T* out = token_of<T>(p.out, p.out_strides, unit.row, place);
    for (int64_t head = 0; head < heads; ++head) {
      const T* q = token + head * dim;
      const T* k = q + heads * dim;
      const T* v = k + heads * dim;
      for (int64_t frame = 0; frame < p.frames; frame += lane_count) {
        const int64_t count = p.frames - frame < lane_count ? p.frames - frame : lane_count;
        const int64_t chunk = frame / lane_count;
        const float* cos = scratch.cos + chunk * angles_size;
        const float* sin = scratch.sin + chunk * angles_size;
        float* q_lanes = scratch.q + chunk * chunk_size;
        float* k_lanes = scratch.k + chunk * chunk_size;
        gather_lanes(q + frame * frame_distance, frame_distance, count, dim, scratch.rows, q_lanes);
        norm_and_rope(q_lanes, dim, p.norm_rope, scratch.q_weight, cos, sin);
        gather_lanes(k + frame * frame_distance, frame_distance, count, dim, scratch.rows, k_lanes);
        norm_and_rope(k_lanes, dim, p.norm_rope, scratch.k_weight, cos, sin);
      }
      for (int64_t frame = 0; frame < p.frames; ++frame)
        widen_row(v + frame * frame_distance, dim, scratch.v + frame * stride);
      attend(p, scratch, chunk_size, out + head * dim);
    }
  }
}

void temporal_attention(const TemporalAttention& p, const AttentionUnit& unit) {
  with_dtype(p.dtype, [&](auto element) { temporal_attention_places<decltype(element)>(p, unit); });
}

}  // namespace ADACACHE_ISA
}  // namespace adacache::cpu

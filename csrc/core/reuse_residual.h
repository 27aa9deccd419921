// x + R for the rows whose video reuses, x for the others: parameters and device body.
#pragma once

#include "gated_residual_meter.h"

namespace adacache {

struct ReuseResidual {
  const void* x;
  void* out;                    // may be x, if x_rows picks no rows
  const int32_t* video_of_row;  // null: row b belongs to video b, or to the only one
  const bool* reuse;            // by video; null: all reuse
  int64_t videos;
  TokenStrides x_strides, out_strides;
  RowIndex x_rows;
  Cache residual;
  int64_t rows, tokens, channels;
  DType dtype;
};

// Each thread has this many vectors in flight.
constexpr int reuse_vectors_per_thread = 2;

ADACACHE_HD int64_t reuse_blocks_per_row(const ReuseResidual& p, int width, int threads) {
  const int64_t per_block = int64_t{threads} * reuse_vectors_per_thread;
  return (p.tokens * (p.channels / width) + per_block - 1) / per_block;
}

inline namespace ADACACHE_ISA {

// R in whatever type it has, element by element.
struct AnyElement {
  float value;

  ADACACHE_HD float get(int) const { return value; }
  static ADACACHE_HD AnyElement load(const void* data, DType dtype, int64_t offset) {
    if (dtype == DType::float32) return {static_cast<const float*>(data)[offset]};
    if (dtype == DType::bfloat16) return {to_float(static_cast<const bfloat16*>(data)[offset])};
    return {to_float(static_cast<const float16*>(data)[offset])};
  }
};

template <class R, int width>
struct KnownElements {
  Packed<R, width> values;

  ADACACHE_HD float get(int i) const { return values.get(i); }
  static ADACACHE_HD KnownElements load(const void* data, DType, int64_t offset) {
    return {Packed<R, width>::load(static_cast<const R*>(data) + offset)};
  }
};

// Residual is KnownElements<R, width>, or AnyElement with width 1.
template <class T, int width, class Residual, class Block>
ADACACHE_HD void reuse_residual_body(Block& block, const ReuseResidual& p) {
  using Values = Packed<T, width>;
  const int64_t vectors = p.channels / width;
  const int64_t blocks_per_row = reuse_blocks_per_row(p, width, block.threads());
  const int64_t row = block.index() / blocks_per_row;
  const int64_t first =
      block.index() % blocks_per_row * block.threads() * reuse_vectors_per_thread + block.thread();
  bool reuse = true;
  bool known = true;
  if (p.reuse) {
    const int64_t video = p.video_of_row ? p.video_of_row[row] : p.videos == 1 ? 0 : row;
    known = video >= 0 && video < p.videos;
    reuse = known && p.reuse[video];
    if (known && !reuse && p.out == p.x) return;
  }
  Values x[reuse_vectors_per_thread] = {};
  Residual residual[reuse_vectors_per_thread] = {};
  int64_t out_offset[reuse_vectors_per_thread];
  for (int i = 0; i < reuse_vectors_per_thread; ++i) {
    const int64_t item = first + int64_t{i} * block.threads();
    out_offset[i] = -1;
    if (item >= p.tokens * vectors) continue;
    const int64_t token = item / vectors;
    const int64_t channel = item % vectors * width;
    out_offset[i] = row * p.out_strides.batch + token * p.out_strides.token + channel;
    x[i] = Values::load(static_cast<const T*>(p.x) + row * p.x_strides.batch + token * p.x_strides.token +
                        channel);
    if (reuse)
      residual[i] =
          Residual::load(p.residual.data, p.residual.dtype,
                         row * p.residual.strides.batch + token * p.residual.strides.token + channel);
  }
  for (int i = 0; i < reuse_vectors_per_thread; ++i) {
    if (out_offset[i] < 0) continue;
    Values result = x[i];
    if (reuse)
      for (int c = 0; c < width; ++c) result.set(c, add(x[i].get(c), residual[i].get(c)));
    // A row of no known video cannot be reported without stopping the host, and must not pass for a result.
    if (!known)
      for (int c = 0; c < width; ++c) result.set(c, static_cast<float>(not_a_number()));
    result.store(static_cast<T*>(p.out) + out_offset[i]);
  }
}

}  // namespace ADACACHE_ISA

inline bool vectors_fit(const ReuseResidual& p, int width) {
  return p.channels % width == 0 && vectors_are_aligned(p.x, width, p.x_strides.batch, p.x_strides.token) &&
         vectors_are_aligned(p.residual.data, width, p.residual.strides.batch, p.residual.strides.token) &&
         vectors_are_aligned(p.out, width, p.out_strides.batch, p.out_strides.token);
}

}  // namespace adacache

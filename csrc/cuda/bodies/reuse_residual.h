// SPDX-License-Identifier: Apache-2.0
// Device body of reuse_residual: x + R for the rows of videos that reuse, x for the others.
#pragma once

#include "../../core/reuse_residual.h"
#include "elementwise.h"

namespace adacache {

inline namespace ADACACHE_ISA {

// Single elements of R, in any dtype.
struct AnyElement {
  float value;

  ADACACHE_HD float get(int) const { return value; }
  static ADACACHE_HD AnyElement load(const Cache& cache, int64_t offset) {
    switch (cache.dtype) {
      case DType::float32:
        return {static_cast<const float*>(cache.data)[offset]};
      case DType::bfloat16:
        return {to_float(static_cast<const bfloat16*>(cache.data)[offset])};
      case DType::float16:
        return {to_float(static_cast<const float16*>(cache.data)[offset])};
      default:
        return {to_float(static_cast<const float8_e4m3*>(cache.data)[offset])};
    }
  }
};

template <class R, int width>
struct KnownElements {
  Packed<R, width> values;

  ADACACHE_HD float get(int i) const { return values.get(i); }
  static ADACACHE_HD KnownElements load(const Cache& cache, int64_t offset) {
    return {Packed<R, width>::load(static_cast<const R*>(cache.data) + offset)};
  }
};

enum class RowOutcome { added, copied, left, unknown };

// The outcome of a row. Reporting an out-of-range video or row would synchronize; the output of such a row is
// NaN.
ADACACHE_HD RowOutcome outcome_of(const ReuseResidual& p, int64_t row) {
  if (row_of(p.x_rows, row) < 0 || row_of(p.residual.rows, row) < 0) return RowOutcome::unknown;
  if (p.reuse == nullptr) return RowOutcome::added;
  const int64_t video = p.video_of_row ? p.video_of_row[row] : p.videos == 1 ? 0 : row;
  if (video < 0 || video >= p.videos) return RowOutcome::unknown;
  if (p.reuse[video]) return RowOutcome::added;
  return p.out == p.x ? RowOutcome::left : RowOutcome::copied;
}

// Residual is KnownElements<R, width>, or AnyElement if width is 1.
template <class T, int width, class Residual, bool flat, class Block>
ADACACHE_HD void reuse_residual_body(Block& block, const ReuseResidual& p, const Plan& plan) {
  using Values = Packed<T, width>;
  struct Loaded {
    Values x;
    Residual residual;
    float scale;
  };
  const int64_t of_row = divide(block.index(), plan.blocks_per_row).quotient;
  const RowOutcome outcome = outcome_of(p, of_row);
  if (outcome == RowOutcome::left) return;
  const int64_t x_row = row_of(p.x_rows, of_row);
  const int64_t residual_row = row_of(p.residual.rows, of_row);
  visit_elements<Loaded, width, flat>(
      block, plan, p.tokens, p.channels,
      [&](int64_t, int64_t token, int64_t channel) {
        Loaded loaded{};
        if (outcome == RowOutcome::unknown) return loaded;
        loaded.x = Values::load(token_at<T>(p.x, p.x_strides, x_row, token, channel));
        if (outcome != RowOutcome::added) return loaded;
        loaded.residual = Residual::load(
            p.residual, residual_row * p.residual.strides.batch + token * p.residual.strides.token + channel);
        if (!flat && p.residual.scale != nullptr)
          loaded.scale = p.residual.scale[residual_row * p.residual.scale_strides.batch +
                                          token * p.residual.scale_strides.token];
        return loaded;
      },
      [&](int64_t row, int64_t token, int64_t channel, const Loaded& loaded) {
        Values out = loaded.x;
        if (outcome == RowOutcome::unknown) out = all_nan<Values, width>();
        if (outcome == RowOutcome::added) {
          float values[width];
          ADACACHE_UNROLL
          for (int c = 0; c < width; ++c) {
            const float stored = loaded.residual.get(c);
            const bool scaled = !flat && p.residual.scale != nullptr;
            values[c] = add(loaded.x.get(c), scaled ? multiply(loaded.scale, stored) : stored);
          }
          out = Values::of(values);
        }
        out.store(token_at<T>(p.out, p.out_strides, row, token, channel));
      });
}

}  // namespace ADACACHE_ISA

inline bool vectors_fit(const ReuseResidual& p, int width) {
  return p.channels % width == 0 && vectors_are_aligned(p.x, p.x_strides, p.dtype, width) &&
         vectors_are_aligned(p.residual, width) && vectors_are_aligned(p.out, p.out_strides, p.dtype, width);
}

inline Plan plan_of(const ReuseResidual& p, int threads) {
  const int wide = vector_width_of(p.dtype);
  const bool fit = vectors_fit(p, wide);
  const bool flat = fit && p.residual.scale == nullptr && p.x_strides.token == p.channels &&
                    p.out_strides.token == p.channels && p.residual.strides.token == p.channels;
  return plan_elementwise(p.rows, p.tokens, p.channels, fit ? wide : 1, threads, flat);
}

}  // namespace adacache

// SPDX-License-Identifier: Apache-2.0
// Layouts of the op tensors: tokens, modulators, kept residuals, row indices.
#pragma once

#include "numeric.h"

namespace adacache {

// Token n of row b starts at element b * batch + n * token. Channels are contiguous.
struct TokenStrides {
  int64_t batch;
  int64_t token;
};

// Tokens are frame-major: n = frame * places + place. In ops without a motion term, a "frame" is a group of
// tokens that share a gate, shift or scale.
struct TokenShape {
  int64_t rows;
  int64_t frames;
  int64_t places;
  int64_t channels;
};

// A gate, shift or scale per row, frame or token. Strides in elements; 0 for broadcast dimensions.
struct Modulator {
  const void* data;  // null: absent (a gate of 1, a shift or scale of 0)
  int64_t batch, frame, place;
  DType dtype;         // that of x, or float32
  const float* table;  // [C], added in float32; null: none
};

// The weight or bias of a norm, [C].
struct ChannelVector {
  const void* data;  // null: absent (a weight of 1, a bias of 0)
  DType dtype;       // that of x, or float32
};

// Where x + gate * y is rounded to the dtype of x: both r = gate * y and the sum, or only the sum. The kept
// and measured r is always rounded.
enum class Rounding : int { eager = 0, float32 = 1 };

// Indexes the rows of a larger tensor by the rows of the batch.
struct RowIndex {
  const int32_t* row;  // null: row b of the batch is row b of the tensor
  int64_t total;       // rows of the tensor
};

// A kept residual. float8 has one scale per token: value = scale * stored.
struct Cache {
  void* data;
  TokenStrides strides;
  DType dtype;
  float* scale;  // null unless dtype is float8_e4m3
  TokenStrides scale_strides;
  RowIndex rows;
};

// rms: without subtracting the mean.
enum class NormKind : int { layer = 0, rms = 1 };

// Modulated norm: (norm(x) * weight + bias) * (1 + scale) + shift.
struct Norm {
  NormKind kind;
  Modulator shift, scale;
  ChannelVector weight, bias;
  float eps;
  void* out;
  TokenStrides out_strides;
  float* out_scale;  // of the tokens of an output in float8_e4m3; null: the output is in the dtype of x
  TokenStrides out_scale_strides;
};

// The dtype of the output, for x of this dtype.
inline DType output_dtype(const Norm& norm, DType dtype) {
  return norm.out_scale ? DType::float8_e4m3 : dtype;
}

inline namespace ADACACHE_ISA {

// The row of the tensor, or -1 if the index is out of range.
ADACACHE_HD int64_t row_of(const RowIndex& rows, int64_t row) {
  if (rows.row == nullptr) return row;
  const int64_t picked = rows.row[row];
  return picked >= 0 && picked < rows.total ? picked : -1;
}

// The largest finite value of float8 e4m3fn.
constexpr float float8_largest = 448.0f;

// The scale of a token, and the factor of its values before rounding to float8. Below the threshold the scale
// is 1, because 448 / largest would overflow. A token with a NaN has scale NaN.
constexpr float float8_negligible = 7.8886090522101181e-31f;  // 2^-100

ADACACHE_HD float float8_scale(float largest) {
  return largest < float8_negligible ? 1.0f : multiply(largest, 1 / float8_largest);
}
ADACACHE_HD float float8_inverse_scale(float largest) {
  return largest < float8_negligible ? 1.0f : float8_largest / largest;
}

}  // namespace ADACACHE_ISA
}  // namespace adacache

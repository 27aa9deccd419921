// SPDX-License-Identifier: Apache-2.0
// The loop of the elementwise ops, which compute no sums.
#pragma once

#include "walk.h"

namespace adacache {

// Vectors in flight per thread. flat: the tokens of a row are contiguous, so that addresses need no division
// and fewer registers.
constexpr int vectors_in_flight(bool flat) { return flat ? 4 : 2; }

inline Plan plan_elementwise(int64_t rows, int64_t tokens, int64_t channels, int width, int threads,
                             bool flat = false) {
  Plan plan;
  plan.threads = threads;
  plan.width = width;
  plan.flat = flat;
  const int64_t per_block = int64_t{threads} * vectors_in_flight(flat);
  plan.blocks_per_row = (tokens * (channels / width) + per_block - 1) / per_block;
  plan.blocks = rows * plan.blocks_per_row;
  return plan;
}

inline namespace ADACACHE_ISA {

// Calls load(row, token, channel) for all vectors of a thread, then finish(row, token, channel, loaded) for
// each. load() returns a Loaded. If flat, the row is a single token.
template <class Loaded, int width, bool flat = false, class Block, class Load, class Finish>
ADACACHE_HD void visit_elements(Block& block, const Plan& plan, int64_t tokens, int64_t channels,
                                const Load& load, const Finish& finish) {
  constexpr int in_flight = vectors_in_flight(flat);
  const int64_t vectors = (flat ? tokens : 1) * (channels / width);
  const Quotient block_of_row = divide(block.index(), plan.blocks_per_row);
  const int64_t row = block_of_row.quotient;
  const int64_t first = block_of_row.remainder * block.threads() * in_flight + block.thread();
  Loaded loaded[in_flight];
  int64_t token[in_flight], channel[in_flight];
  bool inside[in_flight];
  ADACACHE_UNROLL
  for (int i = 0; i < in_flight; ++i) {
    const int64_t item = first + int64_t{i} * block.threads();
    const Quotient of_token = flat ? Quotient{0, item} : divide(item, vectors);
    token[i] = of_token.quotient;
    channel[i] = of_token.remainder * width;
    inside[i] = flat ? item < vectors : token[i] < tokens;
    if (inside[i]) loaded[i] = load(row, token[i], channel[i]);
  }
  ADACACHE_UNROLL
  for (int i = 0; i < in_flight; ++i)
    if (inside[i]) finish(row, token[i], channel[i], loaded[i]);
}

template <class T>
ADACACHE_HD const T* token_at(const void* tensor, const TokenStrides& strides, int64_t row, int64_t token,
                              int64_t channel) {
  return static_cast<const T*>(tensor) + row * strides.batch + token * strides.token + channel;
}

template <class T>
ADACACHE_HD T* token_at(void* tensor, const TokenStrides& strides, int64_t row, int64_t token,
                        int64_t channel) {
  return static_cast<T*>(tensor) + row * strides.batch + token * strides.token + channel;
}

template <class Values, int width>
ADACACHE_HD Values all_nan() {
  float values[width];
  ADACACHE_UNROLL
  for (int c = 0; c < width; ++c) values[c] = bit_cast<float>(0x7fc00000u);
  return Values::of(values);
}

}  // namespace ADACACHE_ISA
}  // namespace adacache

// The walk over a tensor for ops that look at each element by itself and keep no sums.
#pragma once

#include "walk.h"

namespace adacache {

// Vectors that each thread has in flight.
constexpr int vectors_in_flight = 2;

inline Plan plan_elementwise(int64_t rows, int64_t tokens, int64_t channels, int width, int threads) {
  Plan plan;
  plan.threads = threads;
  plan.width = width;
  const int64_t per_block = int64_t{threads} * vectors_in_flight;
  plan.blocks_per_row = (tokens * (channels / width) + per_block - 1) / per_block;
  plan.blocks = rows * plan.blocks_per_row;
  return plan;
}

inline namespace ADACACHE_ISA {

// Calls load(row, token, channel) for the vectors of a thread and then finish(row, token, channel, loaded)
// for each. Loaded is what load() gives.
template <class Loaded, int width, class Block, class Load, class Finish>
ADACACHE_HD void visit_elements(Block& block, const Plan& plan, int64_t tokens, int64_t channels,
                                const Load& load, const Finish& finish) {
  const int64_t vectors = channels / width;
  const Quotient block_of_row = divide(block.index(), plan.blocks_per_row);
  const int64_t row = block_of_row.quotient;
  const int64_t first = block_of_row.remainder * block.threads() * vectors_in_flight + block.thread();
  Loaded loaded[vectors_in_flight];
  int64_t token[vectors_in_flight], channel[vectors_in_flight];
  ADACACHE_UNROLL
  for (int i = 0; i < vectors_in_flight; ++i) {
    const int64_t item = first + int64_t{i} * block.threads();
    const Quotient of_token = divide(item, vectors);
    token[i] = of_token.quotient;
    channel[i] = of_token.remainder * width;
    if (token[i] < tokens) loaded[i] = load(row, token[i], channel[i]);
  }
  ADACACHE_UNROLL
  for (int i = 0; i < vectors_in_flight; ++i)
    if (token[i] < tokens) finish(row, token[i], channel[i], loaded[i]);
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

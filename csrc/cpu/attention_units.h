// SPDX-License-Identifier: Apache-2.0
// Runs the attention ops in parallel, with scratch memory per thread.
#pragma once

#include "parallel.h"

namespace adacache::cpu {

// Scratch memory for one head over `frames` tokens.
inline AttentionScratch attention_scratch(int64_t frames, int64_t dim) {
  const auto sixteens = [](int64_t count) { return (count + 15) / 16 * 16; };
  const int64_t padded_frames = sixteens(frames), padded_dim = sixteens(dim);
  AttentionScratch scratch;
  const std::pair<float**, int64_t> parts[] = {{&scratch.rows, 16 * padded_dim},
                                               {&scratch.q, padded_frames * padded_dim},
                                               {&scratch.k, padded_frames * padded_dim},
                                               {&scratch.v, frames * padded_dim},
                                               {&scratch.scores, padded_frames * 16},
                                               {&scratch.cos, padded_frames * padded_dim},
                                               {&scratch.sin, padded_frames * padded_dim},
                                               {&scratch.q_weight, padded_dim},
                                               {&scratch.k_weight, padded_dim}};
  int64_t floats = 0;
  for (const auto& [part, size] : parts) floats += size;
  auto* memory = static_cast<float*>(thread_scratch(floats * int64_t{sizeof(float)}));
  for (const auto& [part, size] : parts) {
    *part = memory;
    memory += size;
  }
  return scratch;
}

// Calls work(AttentionUnit) for all of the `count` tokens or places of each row.
template <class Work>
void for_each_attention_unit(int64_t rows, int64_t count, int64_t unit_size, int64_t frames, int64_t dim,
                             int64_t bytes, const Work& work) {
  const int64_t units_per_row = (count + unit_size - 1) / unit_size;
  for_each_unit(rows * units_per_row, bytes, [&](int64_t unit) {
    const int64_t first = unit % units_per_row * unit_size;
    work(AttentionUnit{unit / units_per_row, first, std::min(first + unit_size, count),
                       attention_scratch(frames, dim)});
  });
}

}  // namespace adacache::cpu

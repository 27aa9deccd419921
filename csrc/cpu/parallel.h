// SPDX-License-Identifier: Apache-2.0
// Parallel execution on up to torch.get_num_threads() threads. Units of work depend only on shapes, so that
// sums are deterministic for any thread count.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "../core/decide.h"
#include "kernels.h"
#include "ops.h"

namespace adacache::cpu {

// Which outputs use streaming stores.
struct Streaming {
  bool out = false;
  bool norm = false;
};

// Whether to use streaming stores for an output [B, N, C]: it is large, does not alias the input `replaced`,
// and its tokens are aligned to cache lines.
inline bool worth_streaming(const void* out, const void* replaced, const TokenStrides& strides,
                            const TokenShape& shape, DType dtype) {
  const int64_t elements = shape.rows * shape.frames * shape.places * shape.channels;
  constexpr int64_t large_bytes = 8 * 1024 * 1024;
  return out != replaced && elements * bytes_of(dtype) >= large_bytes &&
         reinterpret_cast<uintptr_t>(out) % 64 == 0 && strides.batch * bytes_of(dtype) % 64 == 0 &&
         strides.token * bytes_of(dtype) % 64 == 0;
}

inline bool worth_streaming(const Norm& norm, const void* replaced, const TokenShape& shape, DType dtype) {
  return worth_streaming(norm.out, replaced, norm.out_strides, shape, output_dtype(norm, dtype));
}

// Calls work(unit) for every unit. Dynamic scheduling, so that a busy core does not delay the others.
template <class Work>
void for_each_unit(int64_t units, int64_t bytes, const Work& work) {
#if defined(__SANITIZE_THREAD__)
  constexpr int64_t worthwhile_bytes = 1;  // detect races on small tensors too
#else
  constexpr int64_t worthwhile_bytes = 128 * 1024;
#endif
  int64_t workers = std::min<int64_t>(units, torch::stable::get_num_threads());
  workers = std::min(workers, 1 + bytes / worthwhile_bytes);
  std::atomic<int64_t> next{0};
  const auto take_units = [&](int64_t, int64_t) {
    for (int64_t unit = next++; unit < units; unit = next++) work(unit);
  };
#if defined(__SANITIZE_THREAD__)
  // ThreadSanitizer does not see the synchronization of the torch thread pool.
  std::vector<std::thread> team;
  for (int64_t worker = 0; worker < workers; ++worker) team.emplace_back(take_units, worker, worker + 1);
  for (std::thread& thread : team) thread.join();
#else
  torch::stable::parallel_for(0, workers, 1, take_units);
#endif
}

// Scratch memory of this thread, aligned to a cache line. Valid until the next call on this thread.
inline void* thread_scratch(int64_t bytes) {
  constexpr int64_t cache_line = 64;
  thread_local std::vector<char> memory;
  if (static_cast<int64_t>(memory.size()) < bytes + cache_line) memory.resize(bytes + cache_line);
  const auto begin = reinterpret_cast<uintptr_t>(memory.data());
  return reinterpret_cast<void*>((begin + cache_line - 1) / cache_line * cache_line);
}

inline int64_t scratch_bytes(int64_t channels) {
  return scratch_rows * padded_channels(channels) * int64_t{sizeof(float)};
}

// Calls work(TokenUnit) for all tokens of a tensor.
template <class Work>
void for_each_token_unit(const TokenShape& shape, DType dtype, const Streaming& streaming, const Work& work) {
  const int64_t rows = shape.rows;
  const int64_t tokens = shape.frames * shape.places;
  const int64_t channels = shape.channels;
  const int64_t row_bytes = tokens * channels * bytes_of(dtype);
  if (rows * row_bytes == 0) return;
  // The size of a huge page, so that threads rarely fault in the same page; less for small tensors.
  constexpr int64_t unit_bytes = 2 * 1024 * 1024;
  const int64_t tokens_per_unit =
      std::max<int64_t>(1, std::min(unit_bytes / (channels * bytes_of(dtype)), tokens / 8));
  const int64_t units_per_row = (tokens + tokens_per_unit - 1) / tokens_per_unit;
  for_each_unit(rows * units_per_row, rows * row_bytes, [&](int64_t unit) {
    const int64_t first = unit % units_per_row * tokens_per_unit;
    work(TokenUnit{unit / units_per_row, first, std::min(first + tokens_per_unit, tokens), streaming.out,
                   streaming.norm, static_cast<float*>(thread_scratch(scratch_bytes(channels)))});
  });
}

// Calls work(MeterUnit) for all places of all rows, then adds the partial sums in the order of the units.
template <class Parameters, class Work>
void meter(const Parameters& p, const Streaming& streaming, const MeterSums& result, const Work& work) {
  const TokenShape& shape = p.shape;
  // One frame of a unit stays in the L2 cache until the next frame is measured; small tensors still give
  // several units per core.
  constexpr int64_t frame_bytes = 64 * 1024;
  const int64_t token_bytes = shape.channels * bytes_of(p.dtype);
  const int64_t places_per_unit =
      std::max<int64_t>(1, std::min(frame_bytes / std::max<int64_t>(token_bytes, 1), shape.places / 16));
  const int64_t units_per_row = (shape.places + places_per_unit - 1) / places_per_unit;
  const int64_t units = token_bytes > 0 ? shape.rows * units_per_row : 0;
  const int columns = sum_columns(p.motion);
  const int64_t row_bytes = scratch_bytes(shape.channels);
  const int64_t waiting_bytes =
      waiting_frames(p.motion) * places_per_unit * padded_channels(shape.channels) * int64_t{sizeof(float)};
  std::vector<double> partials(units * columns);
  for_each_unit(units, shape.rows * shape.frames * shape.places * token_bytes, [&](int64_t unit) {
    const int64_t first_place = unit % units_per_row * places_per_unit;
    char* scratch = static_cast<char*>(thread_scratch(row_bytes + waiting_bytes));
    work(MeterUnit{unit / units_per_row, first_place, std::min(first_place + places_per_unit, shape.places),
                   streaming.out, streaming.norm, reinterpret_cast<float*>(scratch), scratch + row_bytes,
                   partials.data() + unit * columns});
  });
  double* sums = result.sums;
  for (int64_t video = 0; video < result.num_videos; ++video)
    for (int column = 0; column < columns; ++column)
      sums[video * columns + column] = measured(column, p.all_columns) ? 0.0 : not_a_number();
  for (int64_t unit = 0; unit < units; ++unit) {
    const int64_t video = result.video_of_row ? result.video_of_row[unit / units_per_row] : 0;
    for (int column = 0; column < columns; ++column)
      if (measured(column, p.all_columns))
        sums[video * columns + column] += partials[unit * columns + column];
  }
}

}  // namespace adacache::cpu

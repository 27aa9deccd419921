// Work on several threads, as many as torch.set_num_threads allows, and the summing of what they found.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <vector>

#include "../core/meter.h"
#include "kernels.h"

namespace adacache::cpu {

// Calls work(unit) for every unit. Threads take units as they come, so that a busy core does not hold up the
// others.
template <class Work>
void for_each_unit(int64_t units, int64_t bytes, const Work& work) {
  constexpr int64_t worthwhile_bytes = 128 * 1024;
  int64_t workers = std::min<int64_t>(units, torch::stable::get_num_threads());
  workers = std::min(workers, 1 + bytes / worthwhile_bytes);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    for (int64_t unit = next++; unit < units; unit = next++) work(unit);
  });
}

// Runs unit_sums(unit, partial) for all units and sums what they leave, in the order of the units: the number
// of threads does not show in the sums.
template <class UnitSumsFunction>
void meter(const MeterShape& shape, const Units& units, DType dtype, const MotionStrides& motion,
           bool all_columns, const int32_t* video_of_row, int64_t num_videos, double* sums,
           const UnitSumsFunction& unit_sums) {
  const int columns = sum_columns(motion);
  std::vector<double> partials(units.count * columns);
  const int64_t bytes =
      shape.rows * shape.frames * shape.places * shape.channels * (dtype == DType::float32 ? 4 : 2);
  for_each_unit(units.count, bytes, [&](int64_t unit) { unit_sums(unit, partials.data() + unit * columns); });
  for (int64_t video = 0; video < num_videos; ++video)
    for (int column = 0; column < columns; ++column)
      sums[video * columns + column] =
          measured(column, all_columns) ? 0.0 : std::numeric_limits<double>::quiet_NaN();
  for (int64_t unit = 0; unit < units.count; ++unit) {
    const int64_t video = video_of_row ? video_of_row[unit / units.per_row] : 0;
    for (int column = 0; column < columns; ++column)
      if (measured(column, all_columns)) sums[video * columns + column] += partials[unit * columns + column];
  }
}

// Whether an output is to be written past the caches: it is large, is not read by the op, and rows start at
// whole cache lines.
inline bool worth_streaming(const void* out, const void* x, const TokenStrides& strides, int64_t elements,
                            int64_t element_bytes) {
  constexpr int64_t large_bytes = 8 * 1024 * 1024;
  return out != x && elements * element_bytes >= large_bytes && reinterpret_cast<uintptr_t>(out) % 64 == 0 &&
         strides.batch * element_bytes % 64 == 0 && strides.token * element_bytes % 64 == 0;
}

}  // namespace adacache::cpu

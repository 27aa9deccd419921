// What the device bodies do together as a block, and how the sums of threads become the sums of a video.
//
// A Block gives thread(), threads() (a multiple of 32), index(), barrier(), shuffle_down(value, distance)
// within each 32 threads, and shared(), memory of the block. On the GPU these are CUDA's own; the tests run a
// block as host threads.
#pragma once

#include "decide.h"
#include "meter.h"

namespace adacache {

constexpr int warp_threads = 32;

inline namespace ADACACHE_ISA {

// Bytes of shared memory that a meter's block needs: motion sums of each thread, then column sums of each
// warp.
ADACACHE_HD int64_t meter_shared_bytes(int threads, const MotionStrides& motion) {
  return int64_t{2} * motion.count * threads * 4 + int64_t{threads / warp_threads} * sum_columns(motion) * 8;
}

// Sums `value` over each warp, in a fixed order; the result is thread 0's.
template <class Block>
ADACACHE_HD double warp_sum(Block& block, double value) {
  for (int distance = warp_threads / 2; distance > 0; distance /= 2)
    value += block.shuffle_down(value, distance);
  return value;
}

// One thread's sums: the elementwise ones in registers, the motion sums in shared memory, because their
// number is only known at run time and registers cannot be indexed.
template <bool all_columns, class Block>
class ThreadSums {
 public:
  ADACACHE_HD ThreadSums(Block& block, const MotionStrides& motion, int64_t frames)
      : block_(block), motion_(motion), frames_(frames), motion_sums_(static_cast<float*>(block.shared())) {
    for (int i = 0; i < 2 * motion.count; ++i) motion_sum(i) = 0;
  }

  ADACACHE_HD void measure(float new_value, float old_value) { meter_.measure(new_value, old_value); }

  // After the elements of a frame.
  ADACACHE_HD void finish_frame(int64_t frame) {
    const float frame_abs = meter_.sums[abs_new];
    meter_.sums[abs_new] = 0;
    abs_new_ += frame_abs;
    for (int i = 0; i < motion_.count; ++i)
      if (const int weight = motion_weight(frame, frames_, motion_.stride[i]))
        motion_sum(2 * i + 1) += weight * frame_abs;
  }

  // current: r of this frame. earlier(stride): r of that many frames before.
  template <int width, class Values, class Earlier>
  ADACACHE_HD void gather_motion(int64_t frame, const Values& current, const Earlier& earlier) {
    for (int i = 0; i < motion_.count; ++i) {
      if (frame < motion_.stride[i]) continue;
      const Values before = earlier(motion_.stride[i]);
      float difference = 0;
      for (int c = 0; c < width; ++c) difference += absolute(current.get(c) - before.get(c));
      motion_sum(2 * i) += difference;
    }
  }

  // Leaves the block's sums at partials[column * distance].
  ADACACHE_HD void finish(double* partials, int64_t distance) {
    const int columns = sum_columns(motion_);
    const int warp = block_.thread() / warp_threads;
    const bool first = block_.thread() % warp_threads == 0;
    double* warp_sums = reinterpret_cast<double*>(motion_sums_ + 2 * motion_.count * block_.threads());
    for (int column = 0; column < first_motion_column; ++column) {
      if (column >= sq_diff && !all_columns) break;
      const double sum = warp_sum(block_, column == abs_new ? abs_new_ : meter_.sums[column]);
      if (first) warp_sums[warp * columns + column] = sum;
    }
    for (int i = 0; i < 2 * motion_.count; ++i) {
      const double sum = warp_sum(block_, motion_sum(i));
      if (first) warp_sums[warp * columns + first_motion_column + i] = sum;
    }
    block_.barrier();
    const int column = block_.thread();
    if (column < columns && measured(column, all_columns)) {
      double sum = 0;
      for (int w = 0; w < block_.threads() / warp_threads; ++w) sum += warp_sums[w * columns + column];
      partials[column * distance] = sum;
    }
  }

 private:
  ADACACHE_HD float& motion_sum(int i) { return motion_sums_[i * block_.threads() + block_.thread()]; }

  Block& block_;
  const MotionStrides& motion_;
  int64_t frames_;
  float* motion_sums_;
  Meter<float, all_columns> meter_;  // its abs_new is the current frame's
  float abs_new_ = 0;
};

// The columns of all blocks' sums, [rows, columns, blocks_per_row], become sums [num_videos, columns]: one
// block of threads for each video and column.
struct VideoSums {
  const double* partials;
  const int32_t* video_of_row;  // null: all rows belong to video 0
  double* sums;
  int64_t rows, blocks_per_row, num_videos;
  int columns;
  bool all_columns;
};

ADACACHE_HD int64_t video_sums_shared_bytes(int threads) { return int64_t{threads / warp_threads} * 8; }

template <class Block>
ADACACHE_HD void video_sums_body(Block& block, const VideoSums& p) {
  const int64_t video = block.index() / p.columns;
  const int column = static_cast<int>(block.index() % p.columns);
  double sum = 0;
  bool poisoned = !measured(column, p.all_columns);
  if (!poisoned) {
    for (int64_t row = 0; row < p.rows; ++row) {
      const int64_t id = p.video_of_row ? p.video_of_row[row] : 0;
      // A wrong id cannot be reported without stopping the host; NaN sums mean `compute` for every video.
      if (id < 0 || id >= p.num_videos) poisoned = true;
      if (id != video) continue;
      const double* of_row = p.partials + (row * p.columns + column) * p.blocks_per_row;
      for (int64_t i = block.thread(); i < p.blocks_per_row; i += block.threads()) sum += of_row[i];
    }
  }
  double* warp_sums = static_cast<double*>(block.shared());
  sum = warp_sum(block, sum);
  if (block.thread() % warp_threads == 0) warp_sums[block.thread() / warp_threads] = sum;
  block.barrier();
  if (block.thread() == 0) {
    sum = 0;
    for (int w = 0; w < block.threads() / warp_threads; ++w) sum += warp_sums[w];
    p.sums[block.index()] = poisoned ? not_a_number() : sum;
  }
}

}  // namespace ADACACHE_ISA
}  // namespace adacache

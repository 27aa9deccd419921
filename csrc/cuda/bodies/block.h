// SPDX-License-Identifier: Apache-2.0
// Block-level reductions, and the reduction of block sums to the sums of a video.
//
// A Block has thread(), threads() (a multiple of 32), index(), barrier(), shared() (shared memory), and per
// warp shuffle_down(value, distance) and warp_largest(value). DeviceBlock maps these to CUDA; the tests run a
// block on the host.
#pragma once

#include "../../core/decide.h"
#include "../../core/meter.h"
#include "walk.h"

namespace adacache {

constexpr int warp_threads = 32;

inline namespace ADACACHE_ISA {

// Byte offsets in the shared memory of a meter.
struct SharedLayout {
  int motion_sums;  // float [2 * strides, threads]; the history of r is at offset 0
  int warp_sums;    // double [warps, columns]
  int exchange;     // of BlockReduction
  int bytes;
};

// Shared memory of BlockReduction: four buffers of one value per warp, padded to a multiple of four.
ADACACHE_HD int exchange_size(int threads) { return (threads / warp_threads + 3) / 4 * 4; }
ADACACHE_HD int exchange_bytes(int threads) { return exchange_size(threads) * 4 * 4; }

// vector_bytes: bytes of r per thread and frame.
ADACACHE_HD SharedLayout shared_layout(int threads, int history, int vector_bytes,
                                       const MotionStrides& motion) {
  const int warps = threads / warp_threads;
  SharedLayout layout{};
  layout.motion_sums = history * threads * vector_bytes;
  layout.warp_sums = layout.motion_sums + 2 * motion.count * threads * 4;
  layout.exchange = (layout.warp_sums + warps * sum_columns(motion) * 8 + 15) / 16 * 16;  // 16-byte loads
  layout.bytes = layout.exchange + exchange_bytes(threads);
  return layout;
}

// Sums `value` over each warp in a fixed order. Lane 0 has the result.
template <class Block, class Value>
ADACACHE_HD Value warp_sum(Block& block, Value value) {
  ADACACHE_UNROLL
  for (int distance = warp_threads / 2; distance > 0; distance /= 2)
    value += block.shuffle_down(value, distance);
  return value;
}

// Sums and maxima over a block; all threads get the result. Double-buffered, so that one barrier per
// reduction is enough: a buffer is written again only after the barrier of the next reduction, which its
// readers reach after reading.
template <class Block>
class BlockReduction {
 public:
  ADACACHE_HD BlockReduction(Block& block, void* exchange)
      : block_(block), exchange_(static_cast<uint32_t*>(exchange)), size_(exchange_size(block.threads())) {
    // The padding, which no warp writes.
    for (int i = block.thread(); i < 4 * size_; i += block.threads())
      if (i % size_ >= block.threads() / warp_threads) exchange_[i] = 0;
  }

  ADACACHE_HD float sum(float value) {
    uint32_t* exchange = next();
    value = warp_sum(block_, value);
    if (first()) exchange[warp()] = bit_cast<uint32_t>(value);
    block_.barrier();
    return total(exchange);
  }

  // Of the bits of non-negative floats. Their integer order is the numeric order, with NaN above infinity.
  ADACACHE_HD uint32_t largest(uint32_t value) {
    uint32_t* exchange = next();
    value = block_.warp_largest(value);
    if (first()) exchange[warp()] = value;
    block_.barrier();
    return largest_of(exchange);
  }

  ADACACHE_HD void sum_and_largest(float& value, uint32_t& largest) {
    uint32_t* exchange = next();
    value = warp_sum(block_, value);
    largest = block_.warp_largest(largest);
    if (first()) {
      exchange[warp()] = bit_cast<uint32_t>(value);
      exchange[size_ + warp()] = largest;
    }
    block_.barrier();
    value = total(exchange);
    largest = largest_of(exchange + size_);
  }

 private:
  ADACACHE_HD int warp() const { return block_.thread() / warp_threads; }
  ADACACHE_HD bool first() const { return block_.thread() % warp_threads == 0; }
  ADACACHE_HD uint32_t* next() {
    second_ = !second_;
    return exchange_ + (second_ ? 2 * size_ : 0);
  }
  ADACACHE_HD float total(const uint32_t* exchange) const {
    float sum = 0;
    ADACACHE_NO_UNROLL
    for (int w = 0; w < size_; w += 4) {
      const Packed<float, 4> four = Packed<float, 4>::load(reinterpret_cast<const float*>(exchange + w));
      sum += (four.get(0) + four.get(1)) + (four.get(2) + four.get(3));
    }
    return sum;
  }
  ADACACHE_HD uint32_t largest_of(const uint32_t* exchange) const {
    uint32_t largest = 0;
    ADACACHE_NO_UNROLL
    for (int w = 0; w < size_; w += 4) {
      const Packed<float, 4> four = Packed<float, 4>::load(reinterpret_cast<const float*>(exchange + w));
      ADACACHE_UNROLL
      for (const uint32_t other : four.words.word) largest = other > largest ? other : largest;
    }
    return largest;
  }

  Block& block_;
  uint32_t* exchange_;
  int size_;
  bool second_ = false;
};

// The sums of one thread over its tokens. Elementwise sums are in registers; motion sums are in shared
// memory, because their count is known only at run time and registers cannot be indexed. The history of r is
// in shared memory as well, so that motion needs no extra pass over global memory.
template <bool all_columns, class Values, int width, int vectors, class Block>
class ThreadSums {
 public:
  ADACACHE_HD ThreadSums(Block& block, const MotionStrides& motion, int history, int frames)
      : block_(block),
        motion_(motion),
        frames_(frames),
        depth_(history),
        shared_(static_cast<char*>(block.shared())),
        layout_(shared_layout(block.threads(), history, vectors * sizeof(Values), motion)) {
    for (int i = 0; i < 2 * motion.count; ++i) {
      motion_sum(i) = 0;
      if (motion.stride[i / 2] > longest_) longest_ = motion.stride[i / 2];
    }
  }

  ADACACHE_HD void* exchange() const { return shared_ + layout_.exchange; }

  // Measures the first `count` elements of a vector; old_value(c) returns the old value of element c.
  template <class Old>
  ADACACHE_HD void measure(const Values& r, const Old& old_value, int count) {
    ADACACHE_UNROLL
    for (int c = 0; c < width; ++c) {
      if (c >= count) continue;
      const float after = r.get(c), before = old_value(c), difference = after - before;
      frame_sums_[abs_diff] += absolute(difference);
      frame_sums_[abs_old] += absolute(before);
      frame_sums_[abs_new] += absolute(after);
      if constexpr (all_columns) {
        frame_sums_[sq_diff] = multiply_add(difference, difference, frame_sums_[sq_diff]);
        frame_sums_[sq_old] = multiply_add(before, before, frame_sums_[sq_old]);
        frame_sums_[sq_new] = multiply_add(after, after, frame_sums_[sq_new]);
        frame_sums_[dot] = multiply_add(after, before, frame_sums_[dot]);
      }
    }
  }

  // Measures motion between r, a vector of this frame, and another frame per stride: an earlier frame if the
  // history is long enough, otherwise a later frame, whose r ahead(stride) recomputes.
  template <class Ahead>
  ADACACHE_HD void measure_motion(int frame, int vector, const Values& r, const Ahead& ahead) {
    ADACACHE_NO_UNROLL
    for (int i = 0; i < motion_.count; ++i) {
      const int stride = motion_.stride[i];
      const bool before = stride <= depth_;
      if (before ? frame < stride : frame + stride >= frames_) continue;
      const Values other = before ? *kept(stride, vector) : ahead(stride);
      float differences[width];
      ADACACHE_UNROLL
      for (int c = 0; c < width; ++c) differences[c] = absolute(r.get(c) - other.get(c));
      motion_sum(2 * i) += sum_of(differences);
    }
    remember(vector, r);
  }

  ADACACHE_HD void remember(int vector, const Values& r) {
    if (depth_ > 0) *kept(0, vector) = r;
  }

  ADACACHE_HD void next_frame_of_history() { slot_ = slot_ + 1 < depth_ ? slot_ + 1 : 0; }

  // Called after the elements of a frame. Sums per frame are added to the totals, which limits float32
  // rounding error.
  ADACACHE_HD void finish_frame(int frame) {
    const float frame_abs = frame_sums_[abs_new];
    if (frame >= longest_ && frame + longest_ < frames_)
      inner_abs_ += frame_abs;  // motion_weight() is 2 for every stride
    else {
      ADACACHE_NO_UNROLL
      for (int i = 0; i < motion_.count; ++i)
        if (const int weight = motion_weight(frame, frames_, motion_.stride[i]))
          motion_sum(2 * i + 1) += weight * frame_abs;
    }
    ADACACHE_UNROLL
    for (int column = 0; column < columns; ++column) {
      sums_[column] += frame_sums_[column];
      frame_sums_[column] = 0;
    }
    next_frame_of_history();
  }

  ADACACHE_HD void poison() {
    ADACACHE_UNROLL
    for (int column = 0; column < columns; ++column) sums_[column] = static_cast<float>(not_a_number());
    for (int i = 0; i < 2 * motion_.count; ++i) motion_sum(i) = static_cast<float>(not_a_number());
  }

  // Writes the sums of the block to partials[column * distance].
  ADACACHE_HD void finish(double* partials, int64_t distance) {
    const int all = sum_columns(motion_);
    const int warp = block_.thread() / warp_threads;
    const bool first = block_.thread() % warp_threads == 0;
    double* warp_sums = reinterpret_cast<double*>(shared_ + layout_.warp_sums);
    ADACACHE_UNROLL
    for (int column = 0; column < columns; ++column) {
      const double sum = warp_sum(block_, static_cast<double>(sums_[column]));
      if (first) warp_sums[warp * all + column] = sum;
    }
    for (int i = 0; i < 2 * motion_.count; ++i) {
      const double inner = i % 2 == 0 ? 0.0 : 2.0 * inner_abs_;
      const double sum = warp_sum(block_, motion_sum(i) + inner);
      if (first) warp_sums[warp * all + first_motion_column + i] = sum;
    }
    block_.barrier();
    const int column = block_.thread();
    if (column < all && measured(column, all_columns)) {
      double sum = 0;
      for (int w = 0; w < block_.threads() / warp_threads; ++w) sum += warp_sums[w * all + column];
      partials[column * distance] = sum;
    }
  }

 private:
  static constexpr int columns = all_columns ? first_motion_column : sq_diff;

  ADACACHE_HD float& motion_sum(int i) const {
    return reinterpret_cast<float*>(shared_ + layout_.motion_sums)[i * block_.threads() + block_.thread()];
  }

  // r of this thread, `stride` frames ago.
  ADACACHE_HD Values* kept(int stride, int vector) const {
    const int slot = slot_ - stride + (stride > slot_ ? depth_ : 0);
    return reinterpret_cast<Values*>(shared_) + (slot * vectors + vector) * block_.threads() +
           block_.thread();
  }

  Block& block_;
  const MotionStrides& motion_;
  int frames_;
  int depth_;
  int slot_ = 0;
  char* shared_;
  SharedLayout layout_;
  float frame_sums_[columns] = {};
  float sums_[columns] = {};
  int longest_ = 0;  // stride
  float inner_abs_ = 0;
};

// Reduces the sums of all blocks, [rows, columns, blocks_per_row], to [num_videos, columns], with one block
// of threads per video and column. Threads stride over rows * blocks_per_row, because either may be 1.
struct VideoSums {
  const double* partials;
  const int32_t* video_of_row;  // null: all rows are video 0
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
  const bool measures = measured(column, p.all_columns);
  double sum = 0;
  if (p.video_of_row && measures)
    for (int64_t row = block.thread(); row < p.rows; row += block.threads()) {
      const int64_t id = p.video_of_row[row];
      // Reporting an out-of-range id would synchronize. NaN sums make `decide` compute every video.
      if (id < 0 || id >= p.num_videos) sum = not_a_number();
    }
  if (measures && p.blocks_per_row > 0) {
    Quotient at = divide(block.thread(), p.blocks_per_row);
    const Quotient step = divide(block.threads(), p.blocks_per_row);
    while (at.quotient < p.rows) {
      constexpr int in_flight = 4;
      const double* from[in_flight];
      int64_t id[in_flight];
      ADACACHE_UNROLL
      for (int i = 0; i < in_flight; ++i) {
        from[i] = p.partials + (at.quotient * p.columns + column) * p.blocks_per_row + at.remainder;
        id[i] = at.quotient >= p.rows ? -1 : p.video_of_row ? p.video_of_row[at.quotient] : 0;
        at.quotient += step.quotient;
        at.remainder += step.remainder;
        if (at.remainder >= p.blocks_per_row) {
          at.remainder -= p.blocks_per_row;
          ++at.quotient;
        }
      }
      double partial[in_flight];
      ADACACHE_UNROLL
      for (int i = 0; i < in_flight; ++i) partial[i] = id[i] == video ? *from[i] : 0.0;
      ADACACHE_UNROLL
      for (int i = 0; i < in_flight; ++i) sum += partial[i];
    }
  }
  double* warp_sums = static_cast<double*>(block.shared());
  sum = warp_sum(block, sum);
  if (block.thread() % warp_threads == 0) warp_sums[block.thread() / warp_threads] = sum;
  block.barrier();
  if (block.thread() == 0) {
    sum = 0;
    for (int w = 0; w < block.threads() / warp_threads; ++w) sum += warp_sums[w];
    p.sums[block.index()] = measures ? sum : not_a_number();
  }
}

}  // namespace ADACACHE_ISA

// Enough threads for several waves on any GPU.
constexpr int64_t enough_threads = int64_t{1} << 18;

// The largest motion stride for which the history of r fits in shared memory. 48 KB need no opt-in.
inline int history_that_fits(const MotionStrides& motion, int threads, int vector_bytes) {
  const int room = 47 * 1024 - shared_layout(threads, 0, vector_bytes, motion).bytes;
  const int limit = (room < 32 * 1024 ? room : 32 * 1024) / (threads * vector_bytes);
  int depth = 0;
  for (int i = 0; i < motion.count; ++i)
    if (motion.stride[i] <= limit && motion.stride[i] > depth) depth = motion.stride[i];
  return depth;
}

// Divides the frames of a row into segments with separate blocks if the places alone would not fill a GPU. A
// segment first recomputes r of the frames in its history, so it is several times longer than the history.
inline void divide_frames(Plan& plan, int64_t rows, int64_t frames, int64_t blocks_per_segment,
                          bool divisible) {
  plan.blocks_per_segment = blocks_per_segment;
  if (rows == 0 || frames == 0 || blocks_per_segment == 0) return;
  const int64_t wanted = (enough_threads - 1) / (rows * blocks_per_segment * plan.threads) + 1;
  const int64_t shortest = 4 * (plan.history > 1 ? plan.history : 1);
  const int64_t most = divisible && frames > shortest ? frames / shortest : 1;
  const int64_t segments = wanted < most ? wanted : most;
  plan.per_segment = static_cast<int>((frames + segments - 1) / segments);
  plan.segments = (frames + plan.per_segment - 1) / plan.per_segment;
  plan.blocks_per_row = plan.segments * blocks_per_segment;
  plan.blocks = rows * plan.blocks_per_row;
}

}  // namespace adacache

// SPDX-License-Identifier: Apache-2.0
// Shared by the metered ops: the sums of a unit, the loop over its frames, and the kept residual.
#pragma once

#include <type_traits>

#include "../../core/meter.h"
#include "tokens.h"

namespace adacache::cpu {
inline namespace ADACACHE_ISA {

// Sums over the elements of a token, per lane.
template <bool all_columns>
struct Meter {
  Lanes sums[all_columns ? first_motion_column : sq_diff] = {};

  void measure(Lanes new_value, Lanes old_value) {
    const Lanes difference = new_value - old_value;
    sums[abs_diff] = sums[abs_diff] + absolute(difference);
    sums[abs_old] = sums[abs_old] + absolute(old_value);
    sums[abs_new] = sums[abs_new] + absolute(new_value);
    if constexpr (all_columns) {
      sums[sq_diff] = sums[sq_diff] + difference * difference;
      sums[sq_old] = sums[sq_old] + old_value * old_value;
      sums[sq_new] = sums[sq_new] + new_value * new_value;
      sums[dot] = sums[dot] + new_value * old_value;
    }
  }
};

// The sums of one unit.
template <bool all_columns>
struct UnitSums {
  WideLanes sums[max_columns];
  WideLanes frame_abs;

  void gather_token(const Meter<all_columns>& token) {
    for (int column = 0; column < (all_columns ? first_motion_column : sq_diff); ++column)
      if (column != abs_new) sums[column].gather(token.sums[column]);
    frame_abs.gather(token.sums[abs_new]);
  }

  template <class T>
  void gather_motion(int stride_index, const T* later, const T* earlier, int64_t channels) {
    Lanes difference;
    for_each_sixteen(channels, [&](int64_t channel, auto count) ADACACHE_INLINE_LAMBDA {
      difference = difference + absolute(widen<T>(load_part(later + channel, count)) -
                                         widen<T>(load_part(earlier + channel, count)));
    });
    sums[first_motion_column + 2 * stride_index].gather(difference);
  }

  void finish_frame(const MotionStrides& motion, int64_t frame, int64_t frames) {
    sums[abs_new].gather(frame_abs, 1);
    for (int i = 0; i < motion.count; ++i)
      if (const int weight = motion_weight(frame, frames, motion.stride[i]))
        sums[first_motion_column + 2 * i + 1].gather(frame_abs, weight);
    frame_abs = WideLanes{};
  }

  void finish_unit(const MotionStrides& motion, double* partial) const {
    for (int column = 0; column < sum_columns(motion); ++column) partial[column] = sums[column].total();
  }
};

// Loops over all frames of the unit's places. measure(frame, place, n, meter) measures token n;
// residual_of(frame, place, n) returns r of this or an earlier frame.
template <bool all_columns, class Measure, class ResidualOf>
ADACACHE_INLINE void walk_unit(const TokenShape& shape, const MotionStrides& motion, const MeterUnit& unit,
                               const Measure& measure, const ResidualOf& residual_of) {
  UnitSums<all_columns> sums;
  for (int64_t frame = 0; frame < shape.frames; ++frame) {
    for (int64_t place = unit.first_place; place < unit.end_place; ++place) {
      const int64_t n = frame * shape.places + place;
      Meter<all_columns> meter;
      measure(frame, place, n, meter);
      sums.gather_token(meter);
      for (int i = 0; i < motion.count; ++i) {
        const int64_t stride = motion.stride[i];
        if (frame < stride) continue;
        sums.gather_motion(i, residual_of(frame, place, n),
                           residual_of(frame - stride, place, n - stride * shape.places), shape.channels);
      }
    }
    sums.finish_frame(motion, frame, shape.frames);
  }
  sums.finish_unit(motion, unit.partial);
}

// The kept residual of a unit in the dtype of x. The new r overwrites the old one, and motion reads it there.
template <class T, class Stored>
class KeptResidual {
 public:
  KeptResidual(const Cache& cache, const TokenShape&, const MotionStrides&, const MeterUnit& unit)
      : cache_(cache), row_(row_of(cache.rows, unit.row)) {}

  void start_token(int64_t, int64_t, int64_t n) {
    token_ = token_of<T>(cache_.data, cache_.strides, row_, n);
  }
  template <class Count>
  ADACACHE_INLINE Lanes old_value(int64_t c, Count count) const {
    return widen(load_part(InputToken<T>{token_, cache_.strides.token}, c, count));
  }
  template <class Count>
  ADACACHE_INLINE void keep(int64_t c, Count count, const RoundedLanes<T>& r) {
    store_part(token_ + c, r.stored, count);
  }
  void finish_token(int64_t) {}
  const T* residual_of(int64_t, int64_t, int64_t n) const {
    return token_of<T>(cache_.data, cache_.strides, row_, n);
  }

 private:
  const Cache& cache_;
  int64_t row_;
  T* token_ = nullptr;
};

// float8: the scale of a token is known only after its last channel, so r is buffered in scratch memory, for
// this frame and as many earlier ones as the longest motion stride.
template <class T>
class KeptResidual<T, float8_e4m3> {
 public:
  KeptResidual(const Cache& cache, const TokenShape& shape, const MotionStrides& motion,
               const MeterUnit& unit)
      : cache_(cache),
        row_(row_of(cache.rows, unit.row)),
        waiting_(static_cast<T*>(unit.waiting)),
        first_place_(unit.first_place),
        places_(unit.end_place - unit.first_place),
        channels_(padded_channels(shape.channels)),
        frames_(waiting_frames(motion)) {}

  void start_token(int64_t frame, int64_t place, int64_t n) {
    token_ = token_of<float8_e4m3>(cache_.data, cache_.strides, row_, n);
    scale_ = token_of<float>(cache_.scale, cache_.scale_strides, row_, n);
    old_scale_ = lanes_of(*scale_);
    residual_ = waiting(frame, place);
    largest_ = {};
  }
  template <class Count>
  ADACACHE_INLINE Lanes old_value(int64_t c, Count count) const {
    return multiply(old_scale_,
                    widen(load_part(InputToken<float8_e4m3>{token_, cache_.strides.token}, c, count)));
  }
  template <class Count>
  ADACACHE_INLINE void keep(int64_t c, Count, const RoundedLanes<T>& r) {
    store(residual_ + c, r.stored);
    largest_.gather(r.value);
  }
  void finish_token(int64_t channels) {
    const float largest = largest_.largest();
    *scale_ = float8_scale(largest);
    const Lanes inverse = lanes_of(float8_inverse_scale(largest));
    for_each_sixteen(channels, [&](int64_t c, auto count) ADACACHE_INLINE_LAMBDA {
      store_part(token_ + c, round<float8_e4m3>(multiply(widen(load(residual_ + c)), inverse)).stored, count);
    });
  }
  const T* residual_of(int64_t frame, int64_t place, int64_t) const { return waiting(frame, place); }

 private:
  T* waiting(int64_t frame, int64_t place) const {
    return waiting_ + (frame % frames_ * places_ + place - first_place_) * channels_;
  }

  const Cache& cache_;
  int64_t row_;
  T* waiting_;
  int64_t first_place_, places_, channels_, frames_;
  float8_e4m3* token_ = nullptr;
  float* scale_ = nullptr;
  T* residual_ = nullptr;
  Lanes old_scale_;
  LargestMagnitude largest_;
};

// A unit of an op that keeps the measured residual. prepare(n) returns the function (channel, count) -> r of
// token n; finish(n) is called after the token.
template <class T, class Stored, bool all_columns, class Parameters, class Prepare, class Finish>
ADACACHE_INLINE void keep_and_measure(const Parameters& p, const MeterUnit& unit, const Prepare& prepare,
                                      const Finish& finish) {
  KeptResidual<T, Stored> kept(p.residual, p.shape, p.motion, unit);
  walk_unit<all_columns>(
      p.shape, p.motion, unit,
      [&](int64_t frame, int64_t place, int64_t n, Meter<all_columns>& meter) {
        const auto residual_of_token = prepare(n);
        kept.start_token(frame, place, n);
        for_each_sixteen(p.shape.channels, [&](int64_t c, auto count) ADACACHE_INLINE_LAMBDA {
          const RoundedLanes<T> r = residual_of_token(c, count);
          meter.measure(r.value, kept.old_value(c, count));
          kept.keep(c, count, r);
        });
        kept.finish_token(p.shape.channels);
        finish(n);
      },
      [&](int64_t frame, int64_t place, int64_t n) { return kept.residual_of(frame, place, n); });
  if (unit.stream_out || unit.stream_norm) finish_streaming();
}

// Calls function(T{}, Stored{}, all_columns) for the dtypes and metric of a metered op.
template <class Parameters, class Function>
void with_metered_types(const Parameters& p, const Function& function) {
  with_dtype(p.dtype, [&](auto element) {
    const auto with_columns = [&](auto stored) {
      if (p.all_columns)
        function(element, stored, std::true_type{});
      else
        function(element, stored, std::false_type{});
    };
    if (p.residual.dtype == DType::float8_e4m3)
      with_columns(float8_e4m3{});
    else
      with_columns(element);
  });
}

}  // namespace ADACACHE_ISA
}  // namespace adacache::cpu

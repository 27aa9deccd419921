// The bodies of the CPU kernels. Included by one file per instruction set, which has set ADACACHE_ISA and
// ADACACHE_KERNELS (the table to define) and is compiled with the options of that instruction set.
#include "../core/lanes.h"
#include "kernels.h"

namespace adacache::cpu {
inline namespace ADACACHE_ISA {

template <class T>
const T* token_of(const void* tensor, const TokenStrides& strides, int64_t row, int64_t token) {
  return static_cast<const T*>(tensor) + row * strides.batch + token * strides.token;
}

template <class T>
T* token_of(void* tensor, const TokenStrides& strides, int64_t row, int64_t token) {
  return static_cast<T*>(tensor) + row * strides.batch + token * strides.token;
}

// Calls body(channel, whole): whole sixteens first, then what is left of the row.
template <class Body>
inline __attribute__((always_inline)) void for_each_sixteen(int64_t channels, const Body& body) {
  int64_t channel = 0;
  for (; channel + lane_count <= channels; channel += lane_count) body(channel, int64_t{lane_count});
  if (channel < channels) body(channel, channels - channel);
}

template <class T>
inline StoredLanes<T> load_part(const T* from, int64_t count) {
  return count == lane_count ? load(from) : load(from, count);
}

template <class T>
inline void store_part(T* to, const StoredLanes<T>& stored, int64_t count) {
  if (count == lane_count)
    store(to, stored);
  else
    store(to, stored, count);
}

// The sums of one unit, gathered token by token.
template <bool all_columns>
struct UnitSums {
  WideLanes sums[max_columns];
  WideLanes frame_abs;

  void gather_token(const Meter<Lanes, all_columns>& token) {
    for (int column = 0; column < (all_columns ? first_motion_column : sq_diff); ++column)
      if (column != abs_new) sums[column].gather(token.sums[column]);
    frame_abs.gather(token.sums[abs_new]);
  }

  template <class T>
  void gather_motion(int stride_index, const T* later, const T* earlier, int64_t channels) {
    Lanes difference;
    for_each_sixteen(channels, [&](int64_t channel, int64_t count) {
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

// Walks all frames of the unit's places: token(frame, n), then the motion against earlier tokens n - stride *
// places.
template <bool all_columns, class Token, class Motion>
inline __attribute__((always_inline)) void walk_unit(const MeterShape& shape, const MotionStrides& motion,
                                                     const Units& units, int64_t unit, double* partial,
                                                     const Token& token, const Motion& motion_between) {
  const int64_t row = unit / units.per_row;
  const int64_t first_place = (unit % units.per_row) * units.places_per_unit;
  const int64_t end = first_place + units.places_per_unit;
  const int64_t end_place = end < shape.places ? end : shape.places;
  UnitSums<all_columns> sums;
  for (int64_t frame = 0; frame < shape.frames; ++frame) {
    for (int64_t place = first_place; place < end_place; ++place) {
      const int64_t n = frame * shape.places + place;
      Meter<Lanes, all_columns> meter;
      token(row, frame, place, n, meter);
      sums.gather_token(meter);
      for (int i = 0; i < motion.count; ++i)
        if (frame >= motion.stride[i]) motion_between(row, n, n - motion.stride[i] * shape.places, i, sums);
    }
    sums.finish_frame(motion, frame, shape.frames);
  }
  sums.finish_unit(motion, partial);
}

template <class T, bool all_columns>
void gated_residual_meter_unit(const GatedResidualMeter& p, const Units& units, int64_t unit, bool streaming,
                               double* partial) {
  const int64_t channels = p.shape.channels;
  walk_unit<all_columns>(
      p.shape, p.motion, units, unit, partial,
      [&](int64_t row, int64_t frame, int64_t place, int64_t n, Meter<Lanes, all_columns>& meter) {
        const T* x = token_of<T>(p.x, p.x_strides, row, n);
        const T* y = token_of<T>(p.y, p.y_strides, row, n);
        const T* gate =
            static_cast<const T*>(p.gate) + row * p.gate_batch + frame * p.gate_frame + place * p.gate_place;
        T* residual = token_of<T>(p.residual, p.residual_strides, row, n);
        T* out = token_of<T>(p.out, p.out_strides, row, n);
        for_each_sixteen(channels, [&](int64_t c, int64_t count) {
          const StoredLanes<T> r =
              narrow<T>(multiply(widen(load_part(gate + c, count)), widen(load_part(y + c, count))));
          const Lanes new_value = widen(r);
          meter.measure(new_value, widen(load_part<T>(residual + c, count)));
          const StoredLanes<T> sum = narrow<T>(add(widen(load_part(x + c, count)), new_value));
          store_part(residual + c, r, count);
          if (streaming && count == lane_count)
            store_streaming(out + c, sum);
          else
            store_part(out + c, sum, count);
        });
      },
      [&](int64_t row, int64_t later, int64_t earlier, int index, UnitSums<all_columns>& sums) {
        sums.gather_motion(
            index, token_of<T>(static_cast<const void*>(p.residual), p.residual_strides, row, later),
            token_of<T>(static_cast<const void*>(p.residual), p.residual_strides, row, earlier), channels);
      });
  if (streaming) finish_streaming();
}

template <class T, bool all_columns>
void residual_meter_unit(const ResidualMeter& p, const Units& units, int64_t unit, double* partial) {
  const int64_t channels = p.shape.channels;
  walk_unit<all_columns>(
      p.shape, p.motion, units, unit, partial,
      [&](int64_t row, int64_t, int64_t, int64_t n, Meter<Lanes, all_columns>& meter) {
        const T* residual = token_of<T>(p.residual, p.residual_strides, row, n);
        const T* old = token_of<T>(p.old, p.old_strides, row, n);
        for_each_sixteen(channels, [&](int64_t c, int64_t count) {
          meter.measure(widen(load_part(residual + c, count)), widen(load_part(old + c, count)));
        });
      },
      [&](int64_t row, int64_t later, int64_t earlier, int index, UnitSums<all_columns>& sums) {
        sums.gather_motion(index, token_of<T>(p.residual, p.residual_strides, row, later),
                           token_of<T>(p.residual, p.residual_strides, row, earlier), channels);
      });
}

template <class T, class R>
void reuse_residual_tokens(const ReuseResidual& p, int64_t row, int64_t first, int64_t last, bool reuse,
                           bool streaming) {
  for (int64_t n = first; n < last; ++n) {
    const T* x = token_of<T>(p.x, p.x_strides, row, n);
    T* out = token_of<T>(p.out, p.out_strides, row, n);
    const R* residual = token_of<R>(p.residual, p.residual_strides, row, n);
    for_each_sixteen(p.channels, [&](int64_t c, int64_t count) {
      StoredLanes<T> result = load_part(x + c, count);
      if (reuse) result = narrow<T>(add(widen(result), widen(load_part(residual + c, count))));
      if (streaming && count == lane_count)
        store_streaming(out + c, result);
      else
        store_part(out + c, result, count);
    });
  }
  if (streaming) finish_streaming();
}

// The types are written out and not found by core's dispatch(): that one is shared by all instruction sets.
template <template <class> class Kernel, class... Arguments>
void with_dtype(DType dtype, Arguments&&... arguments) {
  if (dtype == DType::float32) Kernel<float>::run(arguments...);
  if (dtype == DType::bfloat16) Kernel<bfloat16>::run(arguments...);
  if (dtype == DType::float16) Kernel<float16>::run(arguments...);
}

template <class T>
struct GatedResidualMeterKernel {
  static void run(const GatedResidualMeter& p, const Units& units, int64_t unit, bool streaming,
                  double* partial) {
    (p.all_columns ? gated_residual_meter_unit<T, true>
                   : gated_residual_meter_unit<T, false>)(p, units, unit, streaming, partial);
  }
};

template <class T>
struct ResidualMeterKernel {
  static void run(const ResidualMeter& p, const Units& units, int64_t unit, double* partial) {
    (p.all_columns ? residual_meter_unit<T, true> : residual_meter_unit<T, false>)(p, units, unit, partial);
  }
};

template <class T>
struct ReuseResidualKernel {
  template <class R>
  struct Of {
    static void run(const ReuseResidual& p, int64_t row, int64_t first, int64_t last, bool reuse,
                    bool streaming) {
      reuse_residual_tokens<T, R>(p, row, first, last, reuse, streaming);
    }
  };
  static void run(const ReuseResidual& p, int64_t row, int64_t first, int64_t last, bool reuse,
                  bool streaming) {
    with_dtype<Of>(p.residual_dtype, p, row, first, last, reuse, streaming);
  }
};

void gated_residual_meter(const GatedResidualMeter& p, const Units& units, int64_t unit, bool streaming,
                          double* partial) {
  with_dtype<GatedResidualMeterKernel>(p.dtype, p, units, unit, streaming, partial);
}

void residual_meter(const ResidualMeter& p, const Units& units, int64_t unit, double* partial) {
  with_dtype<ResidualMeterKernel>(p.dtype, p, units, unit, partial);
}

void reuse_residual(const ReuseResidual& p, int64_t row, int64_t first, int64_t last, bool reuse,
                    bool streaming) {
  with_dtype<ReuseResidualKernel>(p.dtype, p, row, first, last, reuse, streaming);
}

}  // namespace ADACACHE_ISA

const Kernels ADACACHE_KERNELS = {ADACACHE_KERNELS_NAME, gated_residual_meter, residual_meter,
                                  reuse_residual};

}  // namespace adacache::cpu

// SPDX-License-Identifier: Apache-2.0
// The division of work between blocks, and pointers that advance from token to token.
#pragma once

#include <type_traits>

#include "../../core/tokens.h"
#include "packed.h"

namespace adacache {

// Bytes between consecutive tokens of a walk, per tensor. Computed on the host, so that the device reads them
// from constant memory instead of registers.
struct Steps {
  int64_t x, y, gate, out;  // stack_residual_meter: x is x_out, y is x_in
  int64_t residual, residual_scale;
  int64_t shift, scale, norm, norm_scale;
  int64_t factor[4];  // of extrapolate_residual_meter
};

// The division of a launch: each batch row into segments of frames, each segment into blocks. Depends only on
// shapes, never on the device, because it determines the order of sums.
struct Plan {
  int threads = 0;             // per block
  int width = 1;               // elements per memory access
  int vectors_per_thread = 0;  // of a token held in registers; 0: the token is read again in each pass
  int history = 0;             // earlier frames whose r is in shared memory
  int per_segment = 0;         // frames per segment; tokens per block if tokens are independent
  int64_t segments = 0;        // per row
  int64_t blocks_per_segment = 0;
  int64_t blocks_per_row = 0;
  int64_t blocks = 0;
  bool flat = false;  // elementwise ops: the tokens of a row are contiguous in each tensor
  Steps steps = {};
};

inline namespace ADACACHE_ISA {

struct Quotient {
  int64_t quotient, remainder;
};

// For non-negative numbers. A 64-bit division takes about a hundred instructions on a GPU.
ADACACHE_HD Quotient divide(int64_t number, int64_t by) {
  if (((number | by) >> 32) == 0) {
    const uint32_t quotient = static_cast<uint32_t>(number) / static_cast<uint32_t>(by);
    return {quotient, static_cast<uint32_t>(number) - quotient * static_cast<uint32_t>(by)};
  }
  return {number / by, number % by};
}

// Equidistant tokens of a row: one place over several frames, or contiguous tokens of a frame.
struct Walk {
  int64_t row;
  int64_t frame, place;  // of the first token
  int64_t places;        // in a frame
  int count;

  ADACACHE_HD int64_t token() const { return frame * places + place; }
};

// A pointer to one channel of the current token.
template <class T>
class Cursor {
 public:
  ADACACHE_HD Cursor(T* data, const TokenStrides& strides, int64_t row, const Walk& walk, int64_t channel,
                     const int64_t& step)
      : at_(data + row * strides.batch + walk.token() * strides.token + channel), step_(step) {}

  // Of a gate, shift or scale in the dtype of x.
  ADACACHE_HD Cursor(const Modulator& modulator, const Walk& walk, int64_t channel, const int64_t& step)
      : at_(static_cast<T*>(modulator.data) +
            (modulator.data == nullptr ? 0
                                       : walk.row * modulator.batch + walk.frame * modulator.frame +
                                             walk.place * modulator.place + channel)),
        step_(step) {}

  ADACACHE_HD T* at(int64_t offset) const { return at_ + offset; }
  ADACACHE_HD T* ahead(int64_t steps, int64_t offset) const { return moved(steps * step_) + offset; }
  ADACACHE_HD void advance() { at_ = moved(step_); }

 private:
  ADACACHE_HD T* moved(int64_t bytes) const {
    using Bytes = std::conditional_t<std::is_const_v<T>, const char, char>;
    return reinterpret_cast<T*>(reinterpret_cast<Bytes*>(at_) + bytes);
  }

  T* at_;
  const int64_t& step_;
};

// Loads a whole vector, or the first `count` elements one by one if memory is not aligned.
template <bool whole, int width, class T>
ADACACHE_HD Packed<T, width> load_vector(const T* from, int count) {
  if constexpr (whole)
    return Packed<T, width>::load(from);
  else
    return Packed<T, width>::load(from, count);
}

template <bool whole, class T, int width>
ADACACHE_HD void store_vector(const Packed<T, width>& values, T* to, int count) {
  if constexpr (whole)
    values.store(to);
  else
    values.store(to, count);
}

// Loads channels of a gate, shift, scale, weight or bias from `element` on. table: of these channels, or
// null.
template <class Element, bool whole, int width>
ADACACHE_HD Packed<typename Elements<Element>::Modulator, width> load_modulator(
    const void* data, DType dtype, int64_t element, [[maybe_unused]] const float* table, int count) {
  using T = typename Elements<Element>::Type;
  if constexpr (Elements<Element>::general) {
    float values[width];
    if (std::is_same_v<T, float> || dtype == DType::float32) {
      const auto stored = load_vector<whole, width>(static_cast<const float*>(data) + element, count);
      ADACACHE_UNROLL
      for (int c = 0; c < width; ++c) values[c] = stored.get(c);
    } else {
      const auto stored = load_vector<whole, width>(static_cast<const T*>(data) + element, count);
      ADACACHE_UNROLL
      for (int c = 0; c < width; ++c) values[c] = stored.get(c);
    }
    if (table != nullptr) {
      const auto more = load_vector<whole, width>(table, count);
      ADACACHE_UNROLL
      for (int c = 0; c < width; ++c) values[c] = add(more.get(c), values[c]);
    }
    return Packed<float, width>::of(values);
  } else {
    return load_vector<whole, width>(static_cast<const T*>(data) + element, count);
  }
}

// A Cursor of a gate, shift or scale.
template <class Element>
class ModulatorCursor {
 public:
  using T = typename Elements<Element>::Type;

  ADACACHE_HD ModulatorCursor(const Modulator& modulator, const Walk& walk, int64_t channel,
                              const int64_t& step)
      : at_(modulator, walk, channel, step) {}

  // Of the token `steps` away.
  template <bool whole, int width>
  ADACACHE_HD Packed<T, width> load(int64_t steps, int64_t offset, int count) const {
    return load_vector<whole, width>(at_.ahead(steps, offset), count);
  }
  ADACACHE_HD void advance() { at_.advance(); }

 private:
  Cursor<const T> at_;
};

template <class T>
class ModulatorCursor<General<T>> {
 public:
  ADACACHE_HD ModulatorCursor(const Modulator& modulator, const Walk& walk, int64_t channel,
                              const int64_t& step)
      : modulator_(modulator),
        step_(step),
        table_(modulator.table == nullptr ? nullptr : modulator.table + channel),
        at_(static_cast<const char*>(modulator.data) +
            (walk.row * modulator.batch + walk.frame * modulator.frame + walk.place * modulator.place +
             channel) *
                bytes_of(modulator.dtype)) {}

  template <bool whole, int width>
  ADACACHE_HD Packed<float, width> load(int64_t steps, int64_t offset, int count) const {
    return load_modulator<General<T>, whole, width>(at_ + steps * step_, modulator_.dtype, offset,
                                                    table_ == nullptr ? nullptr : table_ + offset, count);
  }
  ADACACHE_HD void advance() { at_ += step_; }

 private:
  const Modulator& modulator_;
  const int64_t& step_;
  const float* table_;
  const char* at_;
};

}  // namespace ADACACHE_ISA

// Whether the kernels for General<T> are required.
inline bool is_general(const Modulator& modulator, DType dtype) {
  return modulator.data != nullptr && (modulator.dtype != dtype || modulator.table != nullptr);
}

inline bool is_general(const ChannelVector& vector, DType dtype) {
  return vector.data != nullptr && vector.dtype != dtype;
}

inline int64_t step_of(const TokenStrides& strides, const TokenShape& shape, bool along_frames, DType dtype) {
  return strides.token * (along_frames ? shape.places : 1) * bytes_of(dtype);
}

inline int64_t step_of(const Modulator& modulator, bool along_frames) {
  return (along_frames ? modulator.frame : modulator.place) * bytes_of(modulator.dtype);
}

inline void set_cache_steps(Steps& steps, const Cache& cache, const TokenShape& shape) {
  steps.residual = step_of(cache.strides, shape, /*along_frames=*/true, cache.dtype);
  steps.residual_scale = step_of(cache.scale_strides, shape, /*along_frames=*/true, DType::float32);
}

inline bool vectors_are_aligned(const void* data, const TokenStrides& strides, DType dtype, int width) {
  return vectors_are_aligned(data, dtype, width, strides.batch, strides.token);
}

inline bool vectors_are_aligned(const Modulator& modulator, int width) {
  return modulator.data == nullptr ||
         (vectors_are_aligned(modulator.data, modulator.dtype, width, modulator.batch, modulator.frame,
                              modulator.place) &&
          vectors_are_aligned(modulator.table, DType::float32, width));
}

inline bool vectors_are_aligned(const ChannelVector& vector, int width) {
  return vectors_are_aligned(vector.data, vector.dtype, width);
}

inline bool vectors_are_aligned(const Cache& cache, int width) {
  return vectors_are_aligned(cache.data, cache.strides, cache.dtype, width);
}

}  // namespace adacache

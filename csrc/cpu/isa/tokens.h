// SPDX-License-Identifier: Apache-2.0
// Loops over the channels of a token, 16 at a time.
#pragma once

#include <type_traits>

#include "../../core/tokens.h"
#include "../kernels.h"
#include "lanes.h"

namespace adacache::cpu {
inline namespace ADACACHE_ISA {

// For loop bodies: a call would pass vectors through memory.
#define ADACACHE_INLINE_LAMBDA __attribute__((always_inline))
#define ADACACHE_INLINE inline ADACACHE_INLINE_LAMBDA

template <class T>
const T* token_of(const void* tensor, const TokenStrides& strides, int64_t row, int64_t token) {
  return static_cast<const T*>(tensor) + row * strides.batch + token * strides.token;
}

template <class T>
T* token_of(void* tensor, const TokenStrides& strides, int64_t row, int64_t token) {
  return static_cast<T*>(tensor) + row * strides.batch + token * strides.token;
}

// The modulator of a token; null if absent.
template <class T>
const T* token_of(const Modulator& modulator, int64_t row, int64_t frame, int64_t place) {
  if (!modulator.data) return nullptr;
  return static_cast<const T*>(modulator.data) + row * modulator.batch + frame * modulator.frame +
         place * modulator.place;
}

// Channels stored as T or as float32, with an optional table that is added.
template <class T>
struct FloatChannels {
  const void* values;
  const float* table = nullptr;
  bool wide;  // float32

  FloatChannels(const ChannelVector& vector) : values(vector.data), wide(vector.dtype == DType::float32) {}
  FloatChannels(const Modulator& modulator, int64_t row, int64_t frame, int64_t place)
      : table(modulator.table), wide(modulator.dtype == DType::float32) {
    if (wide)
      values = token_of<float>(modulator, row, frame, place);
    else
      values = token_of<T>(modulator, row, frame, place);
  }

  explicit operator bool() const { return values != nullptr; }
  template <class Count>
  Lanes load(int64_t channel, Count count) const;
};

// Channels stored as T.
template <class T>
struct StoredChannels {
  const T* values;

  StoredChannels(const ChannelVector& vector) : values(static_cast<const T*>(vector.data)) {}
  StoredChannels(const Modulator& modulator, int64_t row, int64_t frame, int64_t place)
      : values(token_of<T>(modulator, row, frame, place)) {}

  explicit operator bool() const { return values != nullptr; }
  template <class Count>
  Lanes load(int64_t channel, Count count) const;
};

// Whether StoredChannels<T> can read it.
template <class T>
bool is_stored_as(const ChannelVector& vector) {
  return !vector.data || (vector.dtype == DType::float32) == std::is_same_v<T, float>;
}

template <class T>
bool is_stored_as(const Modulator& modulator) {
  return !modulator.table && is_stored_as<T>(ChannelVector{modulator.data, modulator.dtype});
}

// A token that is read once, with a prefetch of the next token.
template <class T>
struct InputToken {
  const T* values;
  int64_t to_next;
};

template <class T>
InputToken<T> input_token(const void* tensor, const TokenStrides& strides, int64_t row, int64_t token) {
  return {token_of<T>(tensor, strides, row, token), strides.token};
}

// The count of a full group of 16 channels: a type, so that the main loop is compiled separately from the
// tail.
struct Whole {};

// Calls body(channel, count) for each group of 16 channels, then for the tail.
template <class Body>
ADACACHE_INLINE void for_each_sixteen(int64_t channels, const Body& body) {
  int64_t channel = 0;
  for (; channel + lane_count <= channels; channel += lane_count) body(channel, Whole{});
  if (channel < channels) body(channel, channels - channel);
}

template <class T>
ADACACHE_INLINE StoredLanes<T> load_part(const T* from, Whole) {
  return load(from);
}

template <class T>
ADACACHE_INLINE StoredLanes<T> load_part(const T* from, int64_t count) {
  return load(from, count);
}

// Prefetches the same channels of the next token: without it too few loads are in flight.
template <class T, class Count>
ADACACHE_INLINE StoredLanes<T> load_part(const InputToken<T>& token, int64_t channel, Count count) {
  const T* from = token.values + channel;
  __builtin_prefetch(from + token.to_next);
  return load_part(from, count);
}

template <class T>
template <class Count>
ADACACHE_INLINE Lanes StoredChannels<T>::load(int64_t channel, Count count) const {
  return widen(load_part(values + channel, count));
}

template <class T>
template <class Count>
ADACACHE_INLINE Lanes FloatChannels<T>::load(int64_t channel, Count count) const {
  const Lanes value = wide ? widen(load_part(static_cast<const float*>(values) + channel, count))
                           : widen(load_part(static_cast<const T*>(values) + channel, count));
  return table ? widen(load_part(table + channel, count)) + value : value;
}

template <class T>
ADACACHE_INLINE void store_part(T* to, const StoredLanes<T>& stored, Whole) {
  store(to, stored);
}

template <class T>
ADACACHE_INLINE void store_part(T* to, const StoredLanes<T>& stored, int64_t count) {
  store(to, stored, count);
}

// Stores an output of the op.
template <class T>
ADACACHE_INLINE void put_part(T* to, const StoredLanes<T>& stored, Whole, bool streaming) {
  if (streaming)
    store_streaming(to, stored);
  else
    store(to, stored);
}

template <class T>
ADACACHE_INLINE void put_part(T* to, const StoredLanes<T>& stored, int64_t count, bool) {
  store(to, stored, count);
}

// Calls function(T{}) with the element type of the dtype. Not dispatch() of core, which is shared by all
// instruction sets.
template <class Function>
void with_dtype(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::float32:
      return function(float{});
    case DType::bfloat16:
      return function(bfloat16{});
    case DType::float16:
      return function(float16{});
    case DType::float8_e4m3:
      return;
  }
}

}  // namespace ADACACHE_ISA
}  // namespace adacache::cpu

// SPDX-License-Identifier: Apache-2.0
// The loop of the ops that reduce over a token: layer norms, and residuals kept in float8, whose scale
// depends on the largest element of the token. A block processes one token at a time, with its channel
// vectors in registers.
#pragma once

#include <cmath>

#include "block.h"
#include "elementwise.h"

namespace adacache {

// The maximum number of channel vectors that a thread holds in registers, and of threads per block by that
// number. A longer row is read again in each pass.
constexpr int most_vectors_held = 4;

ADACACHE_HD constexpr int most_threads_of_token(int vectors_held, int width) {
  if (vectors_held == 0) return 512;
  return vectors_held == most_vectors_held && width <= 4 ? 384 : 256;
}

// The limit for an element type: float32 with General modulators would spill registers.
template <class Element>
constexpr int most_vectors_of = std::is_same_v<Element, General<float>> ? 2 : most_vectors_held;

// Threads and vectors per thread depend only on the channels, so that neither alignment nor `general` changes
// the order of the sums of a norm.
inline Plan plan_token(int64_t channels, DType dtype, bool vectors_fit, bool general) {
  Plan plan;
  plan.width = vector_width_of(dtype);
  plan.threads = warp_threads;
  if (channels == 0) return plan;
  const int64_t vectors = (channels + plan.width - 1) / plan.width;
  int held = 1;
  while (held <= most_vectors_held && vectors > int64_t{held} * most_threads_of_token(held, plan.width))
    held *= 2;
  if (held > most_vectors_held) {
    plan.threads = most_threads_of_token(0, plan.width);
  } else {
    const int64_t threads = (vectors + held - 1) / held;
    plan.threads = static_cast<int>((threads + warp_threads - 1) / warp_threads * warp_threads);
    const int most = general && dtype == DType::float32 ? most_vectors_of<General<float>> : most_vectors_held;
    plan.vectors_per_thread = vectors_fit && held <= most ? held : 0;
  }
  return plan;
}

// For ops with independent tokens: a block processes several contiguous tokens of a frame.
inline Plan plan_tokens(const TokenShape& shape, DType dtype, bool vectors_fit, bool general) {
  Plan plan = plan_token(shape.channels, dtype, vectors_fit, general);
  if (shape.channels == 0 || shape.places == 0) return plan;
  const int64_t tokens = shape.rows * shape.frames * shape.places;
  const int64_t per_block = tokens * plan.threads / (4 * enough_threads);
  plan.per_segment = static_cast<int>(per_block < 1 ? 1 : per_block > 8 ? 8 : per_block);
  plan.segments = shape.frames;
  plan.blocks_per_segment = (shape.places + plan.per_segment - 1) / plan.per_segment;
  plan.blocks_per_row = plan.segments * plan.blocks_per_segment;
  plan.blocks = shape.rows * plan.blocks_per_row;
  return plan;
}

template <class P>
Plan plan_token_meter(const P& p, bool vectors_fit, bool general, bool divisible) {
  Plan plan = plan_token(p.shape.channels, p.dtype, vectors_fit, general);
  if (plan.vectors_per_thread > 0)
    plan.history = history_that_fits(p.motion, plan.threads, plan.vectors_per_thread * 16);
  divide_frames(plan, p.shape.rows, p.shape.frames, p.shape.channels == 0 ? 0 : p.shape.places, divisible);
  return plan;
}

inline int token_meter_shared_bytes(const Plan& plan, const MotionStrides& motion) {
  return shared_layout(plan.threads, plan.history, plan.vectors_per_thread * 16, motion).bytes;
}

inline int token_shared_bytes(const Plan& plan) { return exchange_bytes(plan.threads); }

inline Steps add_norm_steps(Steps steps, const Norm& norm, const TokenShape& shape, bool along_frames,
                            DType dtype) {
  steps.shift = step_of(norm.shift, along_frames);
  steps.scale = step_of(norm.scale, along_frames);
  steps.norm = step_of(norm.out_strides, shape, along_frames, output_dtype(norm, dtype));
  steps.norm_scale = step_of(norm.out_scale_strides, shape, along_frames, DType::float32);
  return steps;
}

inline bool is_general(const Norm& norm, DType dtype) {
  return norm.kind != NormKind::layer || is_general(norm.shift, dtype) || is_general(norm.scale, dtype) ||
         is_general(norm.weight, dtype) || is_general(norm.bias, dtype);
}

inline bool norm_vectors_fit(const Norm& norm, DType dtype, int width) {
  return vectors_are_aligned(norm.shift, width) && vectors_are_aligned(norm.scale, width) &&
         vectors_are_aligned(norm.weight, width) && vectors_are_aligned(norm.bias, width) &&
         vectors_are_aligned(norm.out, norm.out_strides, output_dtype(norm, dtype), width);
}

inline namespace ADACACHE_ISA {

// The kept residual of a token, in the dtype of x or in float8.
template <class T, class Stored, int width, bool whole>
class KeptTokens {
 public:
  static constexpr bool float8 = std::is_same_v<Stored, float8_e4m3>;
  using Loaded = Packed<Stored, width>;

  template <class P>
  ADACACHE_HD KeptTokens(const P& p, const Steps& steps, const Walk& walk, int64_t channel)
      : at_(static_cast<Stored*>(p.residual.data), p.residual.strides, row_of(p.residual.rows, walk.row),
            walk, channel, steps.residual),
        scale_(p.residual.scale, p.residual.scale_strides, row_of(p.residual.rows, walk.row), walk, 0,
               steps.residual_scale) {}

  template <class P>
  static ADACACHE_HD bool readable(const P& p, int64_t row) {
    return row_of(p.residual.rows, row) >= 0;
  }

  ADACACHE_HD Loaded load(int64_t steps, int64_t offset, int count) const {
    return load_vector<whole, width>(static_cast<const Stored*>(at_.ahead(steps, offset)), count);
  }
  ADACACHE_HD float load_scale(int64_t steps) const { return float8 ? *scale_.ahead(steps, 0) : 1.0f; }
  static ADACACHE_HD float value(const Loaded& loaded, float scale, int c) {
    return float8 ? multiply(scale, loaded.get(c)) : loaded.get(c);
  }

  ADACACHE_HD void store(const Packed<T, width>& r, int64_t offset, int count) const {
    if constexpr (!float8) store_vector<whole>(r, at_.at(offset), count);
  }
  ADACACHE_HD void store_float8(const Packed<T, width>& r, float inverse, int64_t offset, int count) const {
    float values[width];
    ADACACHE_UNROLL
    for (int c = 0; c < width; ++c) values[c] = multiply(r.get(c), inverse);
    store_vector<whole>(Loaded::of(values), at_.at(offset), count);
  }
  ADACACHE_HD void store_scale(float scale) const { *scale_.at(0) = scale; }

  ADACACHE_HD void advance() {
    at_.advance();
    if (float8) scale_.advance();
  }

 private:
  Cursor<Stored> at_;
  Cursor<float> scale_;
};

// Replaces KeptTokens if no residual is kept; NoSums replaces ThreadSums.
struct NothingKept {
  static constexpr bool float8 = false;
  struct Loaded {};

  template <class P>
  ADACACHE_HD NothingKept(const P&, const Steps&, const Walk&, int64_t) {}
  template <class P>
  static ADACACHE_HD bool readable(const P&, int64_t) {
    return true;
  }
  ADACACHE_HD Loaded load(int64_t, int64_t, int) const { return {}; }
  ADACACHE_HD float load_scale(int64_t) const { return 1.0f; }
  ADACACHE_HD void advance() {}
};

template <class Block>
struct NoSums {
  Block& block;

  ADACACHE_HD void* exchange() const { return block.shared(); }
  ADACACHE_HD void poison() {}
};

// The modulated norm of a token, ((v - mean) * rstd * weight + bias) * (1 + scale) + shift, in float32,
// rounded once to Stored: the dtype of x, or float8_e4m3 with one scale per token.
template <class Element, class Stored, int width, bool whole>
class NormedTokens {
 public:
  static constexpr bool float8 = std::is_same_v<Stored, float8_e4m3>;
  using T = typename Elements<Element>::Type;
  using Values = Packed<T, width>;
  using Result = Packed<Stored, width>;
  using Modulation = Packed<typename Elements<Element>::Modulator, width>;

  ADACACHE_HD NormedTokens(const Norm& norm, const Steps& steps, const Walk& walk, int64_t channel)
      : out_(static_cast<Stored*>(norm.out), norm.out_strides, walk.row, walk, channel, steps.norm),
        out_scale_(norm.out_scale, norm.out_scale_strides, walk.row, walk, 0, steps.norm_scale),
        shift_(norm.shift, walk, channel, steps.shift),
        scale_(norm.scale, walk, channel, steps.scale),
        norm_(norm),
        channel_(channel) {}

  ADACACHE_HD bool is_rms() const { return Elements<Element>::general && norm_.kind == NormKind::rms; }

  ADACACHE_HD void compute(float (&values)[width], const Values& v, float mean, float rstd, int64_t offset,
                           int count) const {
    ADACACHE_UNROLL
    for (int c = 0; c < width; ++c) values[c] = (v.get(c) - mean) * rstd;
    if (norm_.weight.data != nullptr) {
      const Modulation weight = load(norm_.weight, offset, count);
      ADACACHE_UNROLL
      for (int c = 0; c < width; ++c) values[c] *= weight.get(c);
    }
    if (norm_.bias.data != nullptr) {
      const Modulation bias = load(norm_.bias, offset, count);
      ADACACHE_UNROLL
      for (int c = 0; c < width; ++c) values[c] += bias.get(c);
    }
    const bool has_scale = norm_.scale.data != nullptr, has_shift = norm_.shift.data != nullptr;
    if (has_scale || has_shift) {
      const auto scale = has_scale ? scale_.template load<whole, width>(0, offset, count) : Modulation{};
      const auto shift = has_shift ? shift_.template load<whole, width>(0, offset, count) : Modulation{};
      ADACACHE_UNROLL
      for (int c = 0; c < width; ++c) values[c] = multiply_add(values[c], 1 + scale.get(c), shift.get(c));
    }
  }

  ADACACHE_HD void store(const float (&values)[width], int64_t offset, int count) const {
    store_vector<whole>(Result::of(values), out_.at(offset), count);
  }
  ADACACHE_HD void store_scale(float scale) const { *out_scale_.at(0) = scale; }

  ADACACHE_HD void poison(int64_t offset, int count) const {
    store_vector<whole>(all_nan<Result, width>(), out_.at(offset), count);
  }

  ADACACHE_HD void advance() {
    out_.advance();
    if (float8) out_scale_.advance();
    shift_.advance();
    scale_.advance();
  }

 private:
  ADACACHE_HD Modulation load(const ChannelVector& vector, int64_t offset, int count) const {
    return load_modulator<Element, whole, width>(vector.data, vector.dtype, channel_ + offset, nullptr,
                                                 count);
  }

  Cursor<Stored> out_;
  Cursor<float> out_scale_;
  ModulatorCursor<Element> shift_, scale_;
  const Norm& norm_;
  int64_t channel_;
};

// Replaces Norm if there is no norm; NoNorm replaces NormedTokens.
struct NothingNormed {};

struct NoNorm {
  static constexpr bool float8 = false;

  ADACACHE_HD NoNorm(const NothingNormed&, const Steps&, const Walk&, int64_t) {}
  ADACACHE_HD void poison(int64_t, int) const {}
  ADACACHE_HD void advance() {}
};

// The channel vectors of a row that a thread processes: every threads()-th one.
template <int vectors, int width>
struct OwnVectors {
  int64_t channels;
  int64_t first;     // channel
  int64_t distance;  // in channels

  // Calls body(k, offset, count) for each vector, with its offset from the first one and the number of its
  // elements within the row.
  template <class Body>
  ADACACHE_HD void visit(const Body& body) const {
    if constexpr (vectors > 0) {
      ADACACHE_UNROLL
      for (int k = 0; k < vectors; ++k)
        if (first + k * distance < channels) body(k, k * distance, width);
    } else {
      for (int64_t offset = 0; first + offset < channels; offset += distance) {
        const int64_t rest = channels - first - offset;
        body(0, offset, rest < width ? static_cast<int>(rest) : width);
      }
    }
  }
};

template <bool metered, class Values, int width, int vectors, class P, class Block>
ADACACHE_HD auto sums_of_token_walk(Block& block, const P& p, const Plan& plan) {
  if constexpr (metered)
    return ThreadSums<true, Values, width, vectors, Block>(block, p.motion, plan.history,
                                                           static_cast<int>(p.shape.frames));
  else
    return NoSums<Block>{block};
}

ADACACHE_HD float reciprocal_root(float value) {
#if defined(__CUDA_ARCH__)
  return rsqrtf(value);
#else
  return 1 / std::sqrt(value);
#endif
}

// The larger of a magnitude and |value|, as bits.
ADACACHE_HD uint32_t larger_magnitude(uint32_t largest, float value) {
  const uint32_t magnitude = bit_cast<uint32_t>(absolute(value));
  return magnitude > largest ? magnitude : largest;
}

// Source computes r and the result. Kept is KeptTokens or NothingKept. With KeptTokens the walk is over the
// frames of a place, and sums are written to partials as in meter_walk. Normed is NormedTokens or NoNorm.
// vectors: channel vectors that a thread holds in registers; 0: the row is read again in each pass.
template <class Source, class Kept, class Normed, int vectors, class P, class N, class Block>
ADACACHE_HD void token_walk(Block& block, const P& p, const N& norm, const Plan& plan, double* partials) {
  constexpr int width = Source::width;
  constexpr bool holds = vectors > 0;
  constexpr int held = holds ? vectors : 1;
  constexpr bool metered = !std::is_same_v<Kept, NothingKept>;
  constexpr bool float8 = Kept::float8;
  constexpr bool normed = !std::is_same_v<Normed, NoNorm>;
  using Values = typename Source::Values;

  const Quotient in_row = divide(block.index(), plan.blocks_per_row);
  const Quotient in_segment = divide(in_row.remainder, plan.blocks_per_segment);
  const int64_t row = in_row.quotient;
  const int64_t first = (metered ? in_segment.quotient : in_segment.remainder) * plan.per_segment;
  const int64_t rest = (metered ? p.shape.frames : p.shape.places) - first;
  const Walk walk{row, metered ? first : in_segment.quotient, metered ? in_segment.remainder : first,
                  p.shape.places, rest < plan.per_segment ? static_cast<int>(rest) : plan.per_segment};
  const OwnVectors<vectors, width> own{p.shape.channels, int64_t{block.thread()} * width,
                                       int64_t{block.threads()} * width};

  auto sums = sums_of_token_walk<metered, Values, width, held>(block, p, plan);
  Normed normed_token(norm, plan.steps, walk, own.first);
  if (!Source::readable(p, row) || !Kept::readable(p, row)) {
    sums.poison();
    own.visit([&](int, int64_t offset, int count) {
      Source::poison(p, plan.steps, walk, own.first + offset, count);
    });
    for (int i = 0; i < walk.count; ++i, normed_token.advance()) {
      own.visit([&](int, int64_t offset, int count) { normed_token.poison(offset, count); });
      if constexpr (Normed::float8)
        if (block.thread() == 0) normed_token.store_scale(static_cast<float>(not_a_number()));
    }
  } else {
    Source source(p, plan.steps, walk, own.first);
    Kept kept(p, plan.steps, walk, own.first);
    BlockReduction<Block> reduction(block, sums.exchange());
    if constexpr (metered && holds)
      for (int before = first < plan.history ? static_cast<int>(first) : plan.history; before > 0; --before) {
        own.visit([&](int k, int64_t offset, int count) {
          sums.remember(k, source.residual_at(-before, offset, count));
        });
        sums.next_frame_of_history();
      }

    typename Source::Loaded loaded[held] = {};
    typename Kept::Loaded old[held] = {};
    float old_scale = kept.load_scale(0);
    [[maybe_unused]] const float of_channels = 1 / static_cast<float>(p.shape.channels);
    if constexpr (holds)
      own.visit([&](int k, int64_t offset, int count) {
        source.load(loaded[k], offset, count);
        old[k] = kept.load(0, offset, count);
      });

    for (int i = 0; i < walk.count; ++i) {
      const int frame = static_cast<int>(first) + i;
      Values r[held] = {};
      Values result[held] = {};
      float total = 0;
      uint32_t largest = 0;
      if constexpr (!holds) old_scale = kept.load_scale(0);
      own.visit([&](int k, int64_t offset, int count) {
        if constexpr (!holds) {
          source.load(loaded[k], offset, count);
          old[k] = kept.load(0, offset, count);
        }
        r[k] = source.residual(loaded[k]);
        result[k] = source.result(loaded[k], r[k]);
        if constexpr (metered) {
          sums.measure(r[k], [&](int c) { return Kept::value(old[k], old_scale, c); }, count);
          sums.measure_motion(frame, k, r[k],
                              [&](int stride) { return source.residual_at(stride, offset, count); });
          if constexpr (!float8) kept.store(r[k], offset, count);
        }
        if constexpr (float8) {
          ADACACHE_UNROLL
          for (int c = 0; c < width; ++c) largest = larger_magnitude(largest, r[k].get(c));
        }
        if constexpr (normed) {
          float values[width];
          ADACACHE_UNROLL
          for (int c = 0; c < width; ++c) values[c] = result[k].get(c);
          if (normed_token.is_rms()) {
            ADACACHE_UNROLL
            for (int c = 0; c < width; ++c) values[c] *= values[c];
          }
          total += sum_of(values);
        }
        if constexpr (holds || !Source::result_covers_input) source.store_result(result[k], offset, count);
      });
      if constexpr (metered) sums.finish_frame(frame);

      if constexpr (holds) {
        // The rest of this iteration uses other registers. Prefetch the next token.
        source.advance();
        if (i + 1 < walk.count) {
          own.visit([&](int k, int64_t offset, int count) {
            source.load_next(loaded[k], offset, count);
            old[k] = kept.load(1, offset, count);
          });
          old_scale = kept.load_scale(1);
        }
      }

      if constexpr (float8 && normed)
        reduction.sum_and_largest(total, largest);
      else if constexpr (float8)
        largest = reduction.largest(largest);
      else
        total = reduction.sum(total);

      if constexpr (float8) {
        const float inverse = float8_inverse_scale(bit_cast<float>(largest));
        own.visit([&](int k, int64_t offset, int count) {
          if constexpr (!holds) r[k] = source.residual_at(0, offset, count);
          kept.store_float8(r[k], inverse, offset, count);
          if constexpr (!holds && Source::result_covers_input) {
            source.load(loaded[k], offset, count);
            source.store_result(source.result(loaded[k], r[k]), offset, count);
          }
        });
        if (block.thread() == 0) kept.store_scale(float8_scale(bit_cast<float>(largest)));
      }
      if constexpr (normed) {
        const bool rms = normed_token.is_rms();
        const float mean = rms ? 0.0f : total * of_channels;
        float squares = rms ? total : 0.0f;
        if (!rms) {
          own.visit([&](int k, int64_t offset, int count) {
            if constexpr (!holds) result[k] = source.result_again(offset, count);
            float values[width];
            ADACACHE_UNROLL
            for (int c = 0; c < width; ++c) {
              const float difference = result[k].get(c) - mean;
              values[c] = holds || c < count ? difference * difference : 0.0f;
            }
            squares += sum_of(values);
          });
          squares = reduction.sum(squares);
        }
        const float rstd = reciprocal_root(squares * of_channels + norm.eps);
        const auto compute = [&](float (&values)[width], int k, int64_t offset, int count) {
          if constexpr (!holds) result[k] = source.result_again(offset, count);
          normed_token.compute(values, result[k], mean, rstd, offset, count);
        };
        if constexpr (Normed::float8) {
          float values[held][width];
          uint32_t largest_value = 0;
          own.visit([&](int k, int64_t offset, int count) {
            compute(values[k], k, offset, count);
            ADACACHE_UNROLL
            for (int c = 0; c < width; ++c)
              if (holds || c < count) largest_value = larger_magnitude(largest_value, values[k][c]);
          });
          largest_value = reduction.largest(largest_value);
          const float inverse = float8_inverse_scale(bit_cast<float>(largest_value));
          own.visit([&](int k, int64_t offset, int count) {
            if constexpr (!holds) compute(values[k], k, offset, count);
            ADACACHE_UNROLL
            for (int c = 0; c < width; ++c) values[k][c] = multiply(values[k][c], inverse);
            normed_token.store(values[k], offset, count);
          });
          if (block.thread() == 0) normed_token.store_scale(float8_scale(bit_cast<float>(largest_value)));
        } else {
          own.visit([&](int k, int64_t offset, int count) {
            float values[width];
            compute(values, k, offset, count);
            normed_token.store(values, offset, count);
          });
        }
      }
      if constexpr (!holds) source.advance();
      kept.advance();
      normed_token.advance();
    }
  }
  if constexpr (metered)
    sums.finish(partials + row * sum_columns(p.motion) * plan.blocks_per_row + in_row.remainder,
                plan.blocks_per_row);
}

}  // namespace ADACACHE_ISA
}  // namespace adacache

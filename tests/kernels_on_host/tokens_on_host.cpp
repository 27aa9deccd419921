// SPDX-License-Identifier: Apache-2.0
// The ops that reduce over a token, against plain loops: layer norms, and residuals in float8.
#include "../../csrc/cuda/bodies/gated_residual_norm.h"
#include "../../csrc/cuda/bodies/gated_residual_norm_meter.h"
#include "../../csrc/cuda/bodies/layer_norm_modulate.h"
#include "host_meters.h"

namespace adacache::host {
namespace {

// Overrides of a plan: few threads that hold many vectors each, so that small cases cover all kinds of plans.
// Ops that are compared bitwise use the same override.
struct Holding {
  int threads = 0, vectors = 0;  // 0: as planned

  explicit Holding(int64_t channels, int width) {
    if (once_in(4)) return;
    threads = static_cast<int>(one_of({32, 32, 64}));
    vectors = 1;
    while (vectors < most_vectors_held && (vectors * threads * width < channels || once_in(3))) vectors *= 2;
    if (vectors * threads * width < channels) threads = 0;
  }
  // A plan may always read a row again instead of keeping it in registers.
  void change(Plan& plan) const {
    if (threads > 0) {
      plan.threads = threads;
      if (plan.vectors_per_thread > 0) plan.vectors_per_thread = vectors;
    }
    if (once_in(4)) plan.vectors_per_thread = 0;
    if (plan.vectors_per_thread == 0) plan.history = 0;
  }
};

// Several tokens per block: the plans of small shapes have one.
void vary_tokens(Plan& plan, const TokenShape& shape) {
  if (plan.blocks == 0) return;
  plan.per_segment = static_cast<int>(pick(1, 4));
  plan.blocks_per_segment = (shape.places + plan.per_segment - 1) / plan.per_segment;
  plan.blocks_per_row = plan.segments * plan.blocks_per_segment;
  plan.blocks = shape.rows * plan.blocks_per_row;
}

template <class Function>
void with_vectors(const Plan& plan, const Function& function) {
  switch (plan.vectors_per_thread) {
    case 1:
      return function(std::integral_constant<int, 1>{});
    case 2:
      return function(std::integral_constant<int, 2>{});
    case 4:
      return function(std::integral_constant<int, 4>{});
    default:
      return function(std::integral_constant<int, 0>{});
  }
}

// The weights, modulators and output of a norm. Stored: that of the output, float8 with one scale per token.
template <class Element, class Stored = typename Elements<Element>::Type>
struct NormScene {
  using T = typename Elements<Element>::Type;
  static constexpr bool float8 = std::is_same_v<Stored, float8_e4m3>;
  NormKind kind = is_general_case<Element> && once_in(2) ? NormKind::rms : NormKind::layer;
  HostModulator<Element> shift, scale;
  // A weight of the same values in float32 and a bias, for General<T> only in float32.
  HostTensor<T> weight, bias;
  HostTensor<float> wide_weight, wide_bias;
  bool has_weight = once_in(2), has_bias = once_in(2);
  bool wide = is_general_case<Element> && once_in(2);
  float eps = one_of({1e-6f, 1e-5f, 0.1f});
  HostTensor<Stored> out, out_before;
  HostTensor<float> out_scale, out_scale_before;  // [rows, tokens, 1]

  explicit NormScene(const TokenShape& shape)
      : shift(random_modulator<Element>(shape, random_place())),
        scale(random_modulator<Element>(shape, random_place())),
        weight(1, 1, shape.channels, {once_in(4) ? 1 : 0, 0}),
        bias(1, 1, shape.channels),
        wide_weight(1, 1, shape.channels),
        wide_bias(1, 1, shape.channels, {once_in(4) ? 1 : 0, 0}),
        out(shape.rows, shape.frames * shape.places, shape.channels, random_place()),
        out_before(out),
        out_scale(shape.rows, shape.frames * shape.places, 1, random_place()),
        out_scale_before(out_scale) {
    out_before.fill(static_cast<float>(nan));
    out_scale_before.fill(0.5f);
    out = out_before;
    out_scale = out_scale_before;
  }
  Norm get() {
    Norm norm{};
    norm.kind = kind;
    norm.shift = shift.get();
    norm.scale = scale.get();
    if (has_weight) norm.weight = vector(weight, wide_weight);
    if (has_bias) norm.bias = vector(bias, wide_bias);
    norm.eps = eps;
    norm.out = out.data();
    norm.out_strides = out.strides;
    if constexpr (float8) {
      norm.out_scale = out_scale.data();
      norm.out_scale_strides = out_scale.strides;
    }
    return norm;
  }
  ChannelVector vector(HostTensor<T>& narrow, HostTensor<float>& in_float32) const {
    if (wide) return {in_float32.data(), DType::float32};
    return {narrow.data(), dtype_of<T>};
  }
  double weight_of(int64_t c) const { return wide ? wide_weight(0, 0, c) : weight(0, 0, c); }
  double bias_of(int64_t c) const { return wide ? wide_bias(0, 0, c) : bias(0, 0, c); }
  // Checks the norm of the values v(b, n, c); v is NaN in rows with an invalid index.
  template <class V>
  void check(const V& v) const {
    std::vector<double> normed(out.channels);
    for (int64_t b = 0; b < out.rows; ++b)
      for (int64_t n = 0; n < out.tokens; ++n) {
        double mean = 0, variance = 0, largest = 0;
        for (int64_t c = 0; c < out.channels && kind == NormKind::layer; ++c)
          mean += v(b, n, c) / out.channels;
        for (int64_t c = 0; c < out.channels; ++c) {
          variance += (v(b, n, c) - mean) * (v(b, n, c) - mean) / out.channels;
          largest = std::max(largest, std::fabs(v(b, n, c)));
        }
        const double rstd = 1 / std::sqrt(variance + eps);
        bool finite = true;
        double most = 0, most_error = 0;
        for (int64_t c = 0; c < out.channels; ++c) {
          // With an infinity in the token, rms makes the other elements 0.
          const double spread = std::isnan(largest * rstd) ? 0 : largest * rstd;
          double want = (v(b, n, c) - mean) * rstd, size = 1 + std::fabs(want) + spread;
          if (has_weight) want *= weight_of(c), size *= 1 + std::fabs(weight_of(c));
          if (has_bias) want += bias_of(c), size += std::fabs(bias_of(c));
          if (scale.present()) want *= 1 + scale(b, n, c), size *= 1 + std::fabs(scale(b, n, c));
          if (shift.present()) want += shift(b, n, c), size += std::fabs(shift(b, n, c));
          normed[c] = want;
          finite = finite && std::isfinite(want);
          most = std::max(most, std::fabs(want));
          most_error = std::max(most_error, 1e-6 * size);
          if (float8) continue;
          const double rounding = std::is_same_v<T, float>      ? 0
                                  : std::is_same_v<T, bfloat16> ? 1.0 / 256
                                                                : 1.0 / 2048;
          const double got = out(b, n, c);
          if (std::isnan(want)
                  ? !std::isnan(got)
                  : !(std::fabs(got - want) <= rounding * (std::fabs(want) + 1e-4) + 1e-6 * size))
            fail("norm[" + std::to_string(b) + ", " + std::to_string(n) + ", " + std::to_string(c) + "] is " +
                 std::to_string(got) + ", expected " + std::to_string(want));
        }
        if (float8 && out.channels > 0) check_float8(b, n, normed, finite, most, most_error);
      }
    expect_tensor("norm", out, out_before, out);
    if (out.channels > 0) expect_tensor("norm_scale", out_scale, out_scale_before, out_scale);
  }
  // The error of float8: 3 mantissa bits, or the spacing of subnormals.
  void check_float8(int64_t b, int64_t n, const std::vector<double>& normed, bool finite, double most,
                    double most_error) const {
    const std::string where = "[" + std::to_string(b) + ", " + std::to_string(n) + "]";
    const double factor = out_scale(b, n, 0);
    // A token with a NaN is NaN.
    const bool negligible = factor == 1 && most <= most_error + 1e-30;
    expect(finite ? negligible || std::fabs(448 * factor - most) <= most_error + 1e-6 * most
                  : std::isnan(factor),
           "norm_scale" + where + " is " + std::to_string(factor) + " for " + std::to_string(most));
    for (int64_t c = 0; c < out.channels; ++c) {
      const double got = out(b, n, c) * factor, want = normed[c];
      expect(finite ? std::fabs(got - want) <= 1.001 / 16 * std::fabs(want) + factor / 1024 + 1.1 * most_error
                    : std::isnan(out(b, n, c)),
             "norm" + where + "[" + std::to_string(c) + "] is " + std::to_string(got) + ", expected " +
                 std::to_string(want));
    }
  }
};

template <class Element, class Stored = typename Elements<Element>::Type>
void run_layer_norm_modulate(const LayerNormModulate& p, const Holding& holding) {
  Plan plan = plan_of(p);
  holding.change(plan);
  vary_tokens(plan, p.shape);
  with_vectors(plan, [&](auto vectors) {
    launch(in_any_order(plan.blocks), plan.threads, token_shared_bytes(plan),
           [&](HostBlock& block) { layer_norm_modulate_body<Element, vectors, Stored>(block, p, plan); });
  });
}

// layer_norm_modulate of x_out is bit-identical to the norm of the fused ops, for any layout of x_out.
template <class Element, class Stored>
void expect_norm_of(const HostTensor<typename Elements<Element>::Type>& x_out,
                    NormScene<Element, Stored>& norm, const TokenShape& shape, const Holding& holding) {
  using T = typename Elements<Element>::Type;
  HostTensor<T> x(shape.rows, shape.frames * shape.places, shape.channels, random_place());
  for (int64_t b = 0; b < x.rows; ++b)
    for (int64_t n = 0; n < x.tokens; ++n)
      for (int64_t c = 0; c < x.channels; ++c) x.memory[x.at(b, n, c)] = x_out.memory[x_out.at(b, n, c)];
  const HostTensor<Stored> fused = norm.out;
  const HostTensor<float> fused_scale = norm.out_scale;
  norm.out = norm.out_before;
  norm.out_scale = norm.out_scale_before;
  run_layer_norm_modulate<Element, Stored>(
      {x.data(), x.strides, {nullptr, shape.rows}, norm.get(), shape, dtype_of<T>}, holding);
  for (int64_t b = 0; b < x.rows; ++b)
    for (int64_t n = 0; n < x.tokens; ++n)
      for (int64_t c = 0; c < x.channels; ++c)
        if (std::isnan(fused(b, n, c)))
          norm.out.memory[norm.out.at(b, n, c)] = fused.memory[fused.at(b, n, c)];
  expect_same_bits("the norm of x_out", norm.out, fused);
  if (shape.channels > 0)
    expect_tensor("the scale of the norm of x_out", norm.out_scale, norm.out_scale_before, fused_scale);
}

// A norm in float8 is bit-identical to the norm in float32, quantized.
void expect_quantized(const NormScene<float>& norm, const NormScene<float, float8_e4m3>& quantized) {
  const HostTensor<float>& out = norm.out;
  for (int64_t b = 0; b < out.rows; ++b)
    for (int64_t n = 0; n < out.tokens && out.channels > 0; ++n) {
      const Quantised expected(out.channels, [&](int64_t c) { return out(b, n, c); });
      expect(same(quantized.out_scale(b, n, 0), expected.scale), "the scale of the norm differs");
      for (int64_t c = 0; c < out.channels; ++c)
        expect(same(quantized.out(b, n, c), expected(out(b, n, c))), "the quantized norm differs");
    }
}

template <class Element>
void norm_modulate_float8_case(const TokenShape& shape) {
  using T = typename Elements<Element>::Type;
  const HostRows rows = random_rows(shape.rows, false);
  HostTensor<T> x(rows.total, shape.frames * shape.places, shape.channels, random_place());
  add_oddities(x);
  NormScene<Element, float8_e4m3> norm(shape);
  LayerNormModulate p{x.data(), x.strides, rows.get(), norm.get(), shape, dtype_of<T>};
  const Holding holding(shape.channels, vector_width<T>);
  run_layer_norm_modulate<Element, float8_e4m3>(p, holding);
  norm.check([&](int64_t b, int64_t n, int64_t c) { return rows.of(b) < 0 ? nan : x(rows.of(b), n, c); });
  if constexpr (std::is_same_v<Element, float>) {
    NormScene<float> wide(shape);
    p.norm.out = wide.out.data();
    p.norm.out_strides = wide.out.strides;
    p.norm.out_scale = nullptr;
    run_layer_norm_modulate<float>(p, holding);
    expect_quantized(wide, norm);
  }
}

template <class Element>
void layer_norm_modulate_case(const TokenShape& shape) {
  using T = typename Elements<Element>::Type;
  const HostRows rows = random_rows(shape.rows, false);
  HostTensor<T> x(rows.total, shape.frames * shape.places, shape.channels, random_place());
  add_oddities(x);
  const HostTensor<T> before = x;
  NormScene<Element> norm(shape);
  LayerNormModulate p{x.data(), x.strides, rows.get(), norm.get(), shape, dtype_of<T>};
  const bool in_place = rows.index.empty() && once_in(4);
  if (in_place) {
    p.norm.out = x.data();
    p.norm.out_strides = x.strides;
  }
  run_layer_norm_modulate<Element>(p, Holding(shape.channels, vector_width<T>));
  if (in_place) norm.out = norm.out_before = x;
  norm.check(
      [&](int64_t b, int64_t n, int64_t c) { return rows.of(b) < 0 ? nan : before(rows.of(b), n, c); });
}

// Stored: of the norm.
template <class Element, class Stored>
void gated_residual_norm_case(const TokenShape& shape) {
  using T = typename Elements<Element>::Type;
  GatedScene<Element, T> scene(shape);
  scene.cache.rows.index.clear();  // this op has no residual cache
  const GatedResidualMeter m = scene.parameters();
  NormScene<Element, Stored> norm(shape);
  GatedResidualNorm p{{m.x, m.y, m.out, m.x_strides, m.y_strides, m.out_strides, m.x_rows, m.gate, m.rounding,
                       shape, m.dtype},
                      norm.get()};
  const Holding holding(shape.channels, vector_width<T>);
  Plan plan = plan_of(p);
  holding.change(plan);
  vary_tokens(plan, shape);
  with_vectors(plan, [&](auto vectors) {
    launch(in_any_order(plan.blocks), plan.threads, token_shared_bytes(plan),
           [&](HostBlock& block) { gated_residual_norm_body<Element, vectors, Stored>(block, p, plan); });
  });
  const auto x_out = [&](int64_t b, int64_t n, int64_t c) { return scene.x_out(b, n, c); };
  expect_tensor("out", scene.result(), scene.in_place ? scene.x_before : scene.out_before, x_out);
  norm.check(x_out);
  expect_norm_of(scene.result(), norm, shape, holding);
}

template <class Element, class Stored>
void gated_residual_norm_meter_case(const TokenShape& shape) {
  using T = typename Elements<Element>::Type;
  GatedScene<Element, Stored> scene(shape);
  NormScene<Element> norm(shape);
  const GatedResidualNormMeter p{scene.parameters(), norm.get()};
  const Holding holding(shape.channels, vector_width<T>);
  Plan plan = plan_of(p);
  vary(plan, shape, p.meter.motion, true);
  holding.change(plan);
  check_twice(scene, [&] {
    Sums sums;
    with_vectors(plan, [&](auto vectors) {
      sums = run_meter(shape, p.meter.motion, p.meter.all_columns, plan,
                       token_meter_shared_bytes(plan, p.meter.motion), scene.k.videos, scene.k.video_of_row,
                       [&](HostBlock& block, double* partials) {
                         gated_residual_norm_meter_body<Element, Stored, vectors>(block, p, plan, partials);
                       });
    });
    return sums;
  });
  norm.check([&](int64_t b, int64_t n, int64_t c) { return scene.x_out(b, n, c); });
  expect_norm_of(scene.result(), norm, shape, holding);
}

template <class Element, class Scene>
void float8_case(Scene scene, bool divisible) {
  const auto p = scene.parameters();
  Plan plan = plan_of(p, 0);
  vary(plan, p.shape, p.motion, divisible);
  Holding(p.shape.channels, vector_width<Element>).change(plan);
  check_twice(scene, [&] {
    Sums sums;
    with_vectors(plan, [&](auto vectors) {
      sums = run_meter(p.shape, p.motion, p.all_columns, plan, token_meter_shared_bytes(plan, p.motion),
                       scene.k.videos, scene.k.video_of_row, [&](HostBlock& block, double* partials) {
                         float8_meter_body<Element, vectors>(block, p, plan, partials);
                       });
    });
    return sums;
  });
}

template <class Element>
void gated_residual_meter_float8_case(const TokenShape& shape) {
  float8_case<Element>(GatedScene<Element, float8_e4m3>(shape), true);
}

template <class T>
void stack_residual_meter_float8_case(const TokenShape& shape) {
  StackScene<T, float8_e4m3> scene(shape);
  const bool divisible = frames_divisible(scene.parameters());
  float8_case<T>(std::move(scene), divisible);
}

template <class Element>
void modulated_ops(int64_t number, const TokenShape& shape) {
  using T = typename Elements<Element>::Type;
  const std::string general = is_general_case<Element> ? "general " : "";
  const auto start = [&](const char* op) {
    current_case = describe((general + op).c_str(), number, shape, dtype_of<T>);
  };
  start("layer_norm_modulate");
  layer_norm_modulate_case<Element>(shape);
  start("norm_modulate_float8");
  norm_modulate_float8_case<Element>(shape);
  start("gated_residual_norm");
  gated_residual_norm_case<Element, T>(shape);
  start("gated_residual_norm_float8");
  gated_residual_norm_case<Element, float8_e4m3>(shape);
  start("gated_residual_norm_meter");
  if (number % 2 == 0)
    gated_residual_norm_meter_case<Element, T>(shape);
  else
    gated_residual_norm_meter_case<Element, float8_e4m3>(shape);
  start("gated_residual_meter in float8");
  gated_residual_meter_float8_case<Element>(shape);
}

template <class T>
void all_ops(int64_t number, const TokenShape& shape) {
  modulated_ops<T>(number, shape);
  modulated_ops<General<T>>(number, shape);
  current_case = describe("stack_residual_meter in float8", number, shape, dtype_of<T>);
  stack_residual_meter_float8_case<T>(shape);
}

}  // namespace

void token_cases(int64_t cases) {
  for_each_empty_case([](auto element, const TokenShape& shape) {
    all_ops<decltype(element)>(-2, shape);
    all_ops<decltype(element)>(-1, shape);
  });
  for (int64_t i = 0; i < cases; ++i)
    with_random_dtype([&](auto element) {
      using T = decltype(element);
      // In some cases the channels of real models, or more channels than a block can keep in registers.
      TokenShape shape = random_shape(300);
      if (once_in(25)) shape = {1, pick(1, 3), pick(1, 2), one_of<int64_t>({1152, 2304, 4224, 5120, 12320})};
      all_ops<T>(i, shape);
    });
}

}  // namespace adacache::host

// SPDX-License-Identifier: Apache-2.0
// One function per op, shared by the backends: converts the arguments of the schema to checked kernel
// parameters, and allocates outputs that are not given.
#pragma once

#include "../core/decide.h"
#include "../core/extrapolate_residual.h"
#include "../core/extrapolate_residual_meter.h"
#include "../core/fused_qk_norm_rope.h"
#include "../core/gated_residual.h"
#include "../core/gated_residual_meter.h"
#include "../core/gated_residual_norm.h"
#include "../core/gated_residual_norm_meter.h"
#include "../core/layer_norm_modulate.h"
#include "../core/residual_meter.h"
#include "../core/reuse_residual.h"
#include "../core/stack_residual_meter.h"
#include "../core/temporal_attention.h"
#include "checks.h"

namespace adacache::torch_checks {

using Integers = std::vector<int64_t>;
using Tensors = std::vector<Tensor>;

// The last arguments of all meters.
struct MeterArguments {
  const OptionalTensor& video_of_row;
  int64_t num_videos;
  int64_t frames;
  const Integers& strides;
  int64_t metric;
};

// The arguments of a norm.
struct NormArguments {
  const OptionalTensor& shift;
  const OptionalTensor& scale;
  const OptionalTensor& shift_table;
  const OptionalTensor& scale_table;
  const OptionalTensor& weight;
  const OptionalTensor& bias;
  double eps;
};

// The common arguments of the attention ops.
struct HeadArguments {
  const OptionalTensor& q_weight;
  const OptionalTensor& k_weight;
  const OptionalTensor& cos;
  const OptionalTensor& sin;
  bool interleaved;
  double eps;
};

// The parameters of a meter kernel, and the layout of its sums.
template <class Parameters>
struct Metered {
  Parameters parameters;
  const int32_t* video_of_row;  // null: all rows are video 0
  int64_t num_videos, sum_columns;
};

inline int64_t batch_rows(const Tensor& x, const OptionalTensor& x_rows) {
  return x_rows && x_rows->dim() == 1 ? x_rows->size(0) : x.size(0);
}

inline TokenShape frames_of(const Tensor& x, int64_t rows, int64_t frames) {
  require(frames >= 1 && x.size(1) % frames == 0, "frames", "value");
  return {rows, frames, x.size(1) / frames, x.size(2)};
}

// For ops without `frames`: a "frame" is a group of tokens that share a gate, shift or scale.
inline TokenShape groups_of(const Tensor& x, int64_t rows,
                            std::initializer_list<std::pair<const char*, const OptionalTensor*>> modulators) {
  const int64_t tokens = x.size(1);
  int64_t frames = 1;
  for (const auto& [name, modulator] : modulators) {
    const int64_t groups = modulator_groups(*modulator);
    if (groups <= 1 || groups >= tokens) continue;
    require(tokens % groups == 0 && (frames == 1 || frames == groups), name, "shape");
    frames = groups;
  }
  return {rows, frames, tokens / frames, x.size(2)};
}

inline Norm norm(Checks& checks, NormKind kind, const NormArguments& arguments, const TokenShape& batch) {
  Norm n{};
  n.kind = kind;
  n.shift = checks.modulator("shift", arguments.shift, "shift_table", arguments.shift_table, batch);
  n.scale = checks.modulator("scale", arguments.scale, "scale_table", arguments.scale_table, batch);
  n.weight = checks.channel_vector("weight", arguments.weight, batch.channels);
  n.bias = checks.channel_vector("bias", arguments.bias, batch.channels);
  n.eps = checked_eps(arguments.eps);
  return n;
}

// Sets the metric and the motion strides in `measured`, which is p or a member of p.
template <class Parameters, class Part>
Metered<Parameters> metered(Checks& checks, const MeterArguments& meter, Parameters& p, Part& measured) {
  measured.motion = motion_strides(meter.strides, meter.frames);
  measured.all_columns = checked_metric(meter.metric) != Metric::l1;
  const auto* videos = checks.video_of_row(meter.video_of_row, measured.shape.rows, meter.num_videos);
  checks.memory();
  return {p, videos, meter.num_videos, sum_columns(measured.motion)};
}

// The arguments of x + gate * y.
struct GatedArguments {
  const Tensor& x;
  const Tensor& y;
  const OptionalTensor& gate;
  const OptionalTensor& gate_table;
  const OptionalTensor& x_rows;
  int64_t rounding;
};

// Parameters is GatedResidual or GatedResidualMeter.
template <class Parameters, int count>
Parameters gated(Checks& checks, Outputs<count>& outputs, const TokenShape& batch,
                 const GatedArguments& arguments) {
  const Tensor& x = arguments.x;
  const Tensor& y = arguments.y;
  const OptionalTensor& x_rows = arguments.x_rows;
  Parameters p{};
  p.shape = batch;
  p.dtype = floating_dtype("x", x);
  p.x = x.const_data_ptr();
  p.x_strides = token_strides(x);
  p.x_rows = checks.index("x_rows", x_rows, any_number, x.size(0), Use::read);
  p.y_strides = checks.tokens_and_dtype("y", y, batch.rows);
  p.y = y.const_data_ptr();
  p.gate = checks.modulator("gate", arguments.gate, "gate_table", arguments.gate_table, batch);
  p.rounding = checked_rounding(arguments.rounding);
  checks.output(p, outputs, 0, batch.rows, x_rows);
  return p;
}

inline GatedResidual gated_residual(Outputs<1>& outputs, const Tensor& x, const Tensor& y,
                                    const OptionalTensor& gate, const OptionalTensor& gate_table,
                                    const OptionalTensor& x_rows, int64_t rounding) {
  Checks checks("x", x);
  checks.stream("x");
  const TokenShape batch = groups_of(x, batch_rows(x, x_rows), {{"gate", &gate}});
  const auto p = gated<GatedResidual>(checks, outputs, batch, {x, y, gate, gate_table, x_rows, rounding});
  checks.memory();
  return p;
}

inline Metered<GatedResidualMeter> gated_residual_meter(
    Outputs<1>& outputs, const Tensor& x, const Tensor& y, const OptionalTensor& gate,
    const OptionalTensor& gate_table, const Tensor& residual, const OptionalTensor& residual_scale,
    const OptionalTensor& x_rows, const OptionalTensor& residual_rows, int64_t rounding,
    const OptionalTensor& video_of_row, int64_t num_videos, int64_t frames, const Integers& strides,
    int64_t metric) {
  Checks checks("x", x);
  checks.stream("x");
  const TokenShape batch = frames_of(x, batch_rows(x, x_rows), frames);
  auto p = gated<GatedResidualMeter>(checks, outputs, batch, {x, y, gate, gate_table, x_rows, rounding});
  p.residual =
      checks.cache(residual, residual_scale, "residual_rows", residual_rows, Use::written, batch.rows);
  return metered(checks, {video_of_row, num_videos, frames, strides, metric}, p, p);
}

inline Metered<StackResidualMeter> stack_residual_meter(
    Outputs<1>& outputs, const Tensor& x_out, const Tensor& x_in, const Tensor& residual,
    const OptionalTensor& residual_scale, const OptionalTensor& rows, const OptionalTensor& video_of_row,
    int64_t num_videos, int64_t frames, const Integers& strides, int64_t metric) {
  Checks checks("x_out", x_out);
  StackResidualMeter p{};
  p.dtype = checks.stream("x_out");
  p.shape = frames_of(x_out, x_out.size(0), frames);
  p.x_out = x_out.const_data_ptr();
  p.x_out_strides = token_strides(x_out);
  p.x_in_strides = checks.tokens_and_dtype("x_in", x_in, rows ? any_number : p.shape.rows);
  p.x_in = x_in.const_data_ptr();
  p.residual = checks.cache(residual, residual_scale, "rows", rows, Use::written, p.shape.rows);
  p.rows = p.residual.rows;
  require(residual.size(0) == x_in.size(0), "residual", "shape");
  if (outputs.given) {  // a copy of x_out, only if requested
    const Tensor& out = *outputs.tensors[0];
    p.out_strides = checks.tokens_and_dtype("out", out, x_in.size(0), Use::written, &x_in);
    p.out = out.mutable_data_ptr();
  }
  return metered(checks, {video_of_row, num_videos, frames, strides, metric}, p, p);
}

inline Metered<ResidualMeter> residual_meter(Outputs<0>&, const Tensor& residual, const Tensor& old,
                                             const OptionalTensor& video_of_row, int64_t num_videos,
                                             int64_t frames, const Integers& strides, int64_t metric) {
  Checks checks("residual", residual);
  ResidualMeter p{};
  p.dtype = checks.stream("residual");
  p.shape = frames_of(residual, residual.size(0), frames);
  p.residual = residual.const_data_ptr();
  p.residual_strides = token_strides(residual);
  p.old_strides = checks.tokens_and_dtype("old", old, p.shape.rows);
  p.old = old.const_data_ptr();
  return metered(checks, {video_of_row, num_videos, frames, strides, metric}, p, p);
}

// Common parameters of reuse_residual and extrapolate_residual.
template <class Parameters>
Parameters stream_parameters(Checks& checks, Outputs<1>& outputs, const Tensor& x,
                             const OptionalTensor& x_rows) {
  Parameters p{};
  p.dtype = checks.stream("x");
  p.rows = batch_rows(x, x_rows);
  p.tokens = x.size(1);
  p.channels = x.size(2);
  p.x = x.const_data_ptr();
  p.x_strides = token_strides(x);
  p.x_rows = checks.index("x_rows", x_rows, any_number, x.size(0), Use::read);
  checks.output(p, outputs, 0, p.rows, x_rows);
  return p;
}

inline ReuseResidual reuse_residual(Outputs<1>& outputs, const Tensor& x, const Tensor& residual,
                                    const OptionalTensor& residual_scale, const OptionalTensor& x_rows,
                                    const OptionalTensor& residual_rows, const OptionalTensor& video_of_row,
                                    const OptionalTensor& reuse) {
  Checks checks("x", x);
  auto p = stream_parameters<ReuseResidual>(checks, outputs, x, x_rows);
  p.residual = checks.cache(residual, residual_scale, "residual_rows", residual_rows, Use::read, p.rows);
  p.videos = 1;
  if (reuse) {
    p.videos = reuse->dim() == 1 ? reuse->size(0) : 0;
    require(reuse->dim() == 1 && (video_of_row || p.videos == 1 || p.videos == p.rows), "reuse", "shape");
    p.reuse = checks.packed<bool>("reuse", *reuse, ScalarType::Bool);
    if (video_of_row) p.video_of_row = checks.indices("video_of_row", *video_of_row, p.rows, p.videos);
  }
  checks.memory();
  return p;
}

inline void set_factors(Checks& checks, ExtrapolateResidual& p, const Tensors& factors,
                        const OptionalTensor& residual_rows) {
  require(factors.size() >= 1 && factors.size() <= max_factors, "factors", "value");
  p.factors = static_cast<int>(factors.size());
  p.factor_dtype = floating_dtype("factors", factors[0]);
  const int64_t factor_rows = residual_rows && factors[0].dim() == 3 ? factors[0].size(0) : p.rows;
  for (int i = 0; i < p.factors; ++i) {
    require(factors[i].scalar_type() == factors[0].scalar_type(), "factors", "dtype");
    p.factor_strides[i] = checks.tokens("factors", factors[i], factor_rows);
    p.factor[i] = factors[i].const_data_ptr();
  }
  p.factor_rows = checks.index("residual_rows", residual_rows, p.rows, factor_rows, Use::read);
}

inline ExtrapolateResidual extrapolate_residual(Outputs<1>& outputs, const Tensor& x, const Tensors& factors,
                                                const Tensor& coefficients, const OptionalTensor& x_rows,
                                                const OptionalTensor& residual_rows,
                                                const OptionalTensor& video_of_row) {
  Checks checks("x", x);
  auto p = stream_parameters<ExtrapolateResidual>(checks, outputs, x, x_rows);
  set_factors(checks, p, factors, residual_rows);
  p.videos = coefficients.dim() == 2 ? coefficients.size(0) : 0;
  require(coefficients.dim() == 2 && coefficients.size(1) == p.factors &&
              (video_of_row || p.videos == 1 || p.videos == p.rows),
          "coefficients", "shape");
  p.coefficients = checks.packed<float>("coefficients", coefficients, ScalarType::Float);
  if (video_of_row) p.video_of_row = checks.indices("video_of_row", *video_of_row, p.rows, p.videos);
  checks.memory();
  return p;
}

inline Metered<ExtrapolateResidualMeter> extrapolate_residual_meter(
    Outputs<1>& outputs, const Tensor& x, const Tensors& factors, const Tensor& coefficients,
    const OptionalTensor& other_coefficients, const OptionalTensor& computed, const OptionalTensor& x_rows,
    const OptionalTensor& residual_rows, const OptionalTensor& video_of_row, int64_t num_videos,
    int64_t frames, const Integers& strides, int64_t metric) {
  Checks checks("x", x);
  ExtrapolateResidualMeter p{};
  p.forecast = stream_parameters<ExtrapolateResidual>(checks, outputs, x, x_rows);
  set_factors(checks, p.forecast, factors, residual_rows);
  p.dtype = p.forecast.dtype;
  p.shape = frames_of(x, p.forecast.rows, frames);
  const auto by_video = [&](const char* argument, const Tensor& tensor) {
    require(tensor.dim() == 2 && tensor.size(0) == num_videos && tensor.size(1) == p.forecast.factors,
            argument, "shape");
    return checks.packed<float>(argument, tensor, ScalarType::Float);
  };
  p.forecast.coefficients = by_video("coefficients", coefficients);
  p.forecast.videos = num_videos;
  require(other_coefficients.has_value() != computed.has_value(), "computed", "value");
  if (computed) {
    p.computed_strides = checks.tokens_and_dtype("computed", *computed, p.shape.rows);
    p.computed = computed->const_data_ptr();
  } else {
    p.other_coefficients = by_video("other_coefficients", *other_coefficients);
  }
  auto m = metered(checks, {video_of_row, num_videos, frames, strides, metric}, p, p);
  m.parameters.forecast.video_of_row = m.video_of_row;
  return m;
}

// Two outputs: those of a norm in float8.
template <int count>
LayerNormModulate norm_modulate(Outputs<count>& outputs, NormKind kind, const Tensor& x,
                                const NormArguments& arguments, const OptionalTensor& x_rows) {
  Checks checks("x", x);
  LayerNormModulate p{};
  p.dtype = checks.stream("x");
  p.shape = groups_of(x, batch_rows(x, x_rows), {{"shift", &arguments.shift}, {"scale", &arguments.scale}});
  p.x = x.const_data_ptr();
  p.x_strides = token_strides(x);
  p.x_rows = checks.index("x_rows", x_rows, any_number, x.size(0), Use::read);
  p.norm = norm(checks, kind, arguments, p.shape);
  if constexpr (count == 2)
    checks.float8_output(p.norm, outputs, 0, p.shape.rows);
  else
    checks.output(p.norm, outputs, 0, p.shape.rows, x_rows);
  checks.memory();
  return p;
}

inline LayerNormModulate layer_norm_modulate(Outputs<1>& outputs, const Tensor& x,
                                             const OptionalTensor& shift, const OptionalTensor& scale,
                                             const OptionalTensor& shift_table,
                                             const OptionalTensor& scale_table, const OptionalTensor& weight,
                                             const OptionalTensor& bias, double eps,
                                             const OptionalTensor& x_rows) {
  return norm_modulate(outputs, NormKind::layer, x,
                       {shift, scale, shift_table, scale_table, weight, bias, eps}, x_rows);
}

inline LayerNormModulate rms_norm_modulate(Outputs<1>& outputs, const Tensor& x, const OptionalTensor& shift,
                                           const OptionalTensor& scale, const OptionalTensor& shift_table,
                                           const OptionalTensor& scale_table, const OptionalTensor& weight,
                                           const OptionalTensor& bias, double eps,
                                           const OptionalTensor& x_rows) {
  return norm_modulate(outputs, NormKind::rms, x, {shift, scale, shift_table, scale_table, weight, bias, eps},
                       x_rows);
}

inline LayerNormModulate norm_modulate_float8(Outputs<2>& outputs, const Tensor& x,
                                              const OptionalTensor& shift, const OptionalTensor& scale,
                                              const OptionalTensor& shift_table,
                                              const OptionalTensor& scale_table, const OptionalTensor& weight,
                                              const OptionalTensor& bias, double eps,
                                              const OptionalTensor& x_rows, int64_t norm) {
  return norm_modulate(outputs, checked_norm(norm), x,
                       {shift, scale, shift_table, scale_table, weight, bias, eps}, x_rows);
}

// Three outputs: the norm is in float8.
template <int count>
GatedResidualNorm normed_residual(Outputs<count>& outputs, const GatedArguments& arguments,
                                  const NormArguments& norm, int64_t kind) {
  const Tensor& x = arguments.x;
  Checks checks("x", x);
  checks.stream("x");
  const TokenShape batch =
      groups_of(x, batch_rows(x, arguments.x_rows),
                {{"gate", &arguments.gate}, {"shift", &norm.shift}, {"scale", &norm.scale}});
  GatedResidualNorm p{};
  p.residual = gated<GatedResidual>(checks, outputs, batch, arguments);
  p.norm = torch_checks::norm(checks, checked_norm(kind), norm, batch);
  if constexpr (count == 3)
    checks.float8_output(p.norm, outputs, 1, batch.rows);
  else
    checks.output(p.norm, outputs, 1, batch.rows, arguments.x_rows);
  checks.memory();
  return p;
}

inline GatedResidualNorm gated_residual_norm(Outputs<2>& outputs, const Tensor& x, const Tensor& y,
                                             const OptionalTensor& gate, const OptionalTensor& gate_table,
                                             const OptionalTensor& shift, const OptionalTensor& scale,
                                             const OptionalTensor& shift_table,
                                             const OptionalTensor& scale_table, const OptionalTensor& weight,
                                             const OptionalTensor& bias, double eps,
                                             const OptionalTensor& x_rows, int64_t rounding, int64_t norm) {
  return normed_residual(outputs, {x, y, gate, gate_table, x_rows, rounding},
                         {shift, scale, shift_table, scale_table, weight, bias, eps}, norm);
}

inline GatedResidualNorm gated_residual_norm_float8(
    Outputs<3>& outputs, const Tensor& x, const Tensor& y, const OptionalTensor& gate,
    const OptionalTensor& gate_table, const OptionalTensor& shift, const OptionalTensor& scale,
    const OptionalTensor& shift_table, const OptionalTensor& scale_table, const OptionalTensor& weight,
    const OptionalTensor& bias, double eps, const OptionalTensor& x_rows, int64_t rounding, int64_t norm) {
  return normed_residual(outputs, {x, y, gate, gate_table, x_rows, rounding},
                         {shift, scale, shift_table, scale_table, weight, bias, eps}, norm);
}

inline Metered<GatedResidualNormMeter> gated_residual_norm_meter(
    Outputs<2>& outputs, const Tensor& x, const Tensor& y, const OptionalTensor& gate,
    const OptionalTensor& gate_table, const Tensor& residual, const OptionalTensor& residual_scale,
    const OptionalTensor& shift, const OptionalTensor& scale, const OptionalTensor& shift_table,
    const OptionalTensor& scale_table, const OptionalTensor& weight, const OptionalTensor& bias, double eps,
    const OptionalTensor& x_rows, const OptionalTensor& residual_rows, int64_t rounding, int64_t norm,
    const OptionalTensor& video_of_row, int64_t num_videos, int64_t frames, const Integers& strides,
    int64_t metric) {
  Checks checks("x", x);
  checks.stream("x");
  const TokenShape batch = frames_of(x, batch_rows(x, x_rows), frames);
  GatedResidualNormMeter p{};
  p.meter = gated<GatedResidualMeter>(checks, outputs, batch, {x, y, gate, gate_table, x_rows, rounding});
  p.meter.residual =
      checks.cache(residual, residual_scale, "residual_rows", residual_rows, Use::written, batch.rows);
  p.norm = torch_checks::norm(checks, checked_norm(norm),
                              {shift, scale, shift_table, scale_table, weight, bias, eps}, batch);
  checks.output(p.norm, outputs, 1, batch.rows, x_rows);
  return metered(checks, {video_of_row, num_videos, frames, strides, metric}, p, p.meter);
}

struct Decide {
  DecisionRule rule;
  Schedules schedules;
  const double* sums;
  double* state;
  int64_t videos, state_columns, sums_columns, site;
};

inline Decide decide(Outputs<0>&, const Tensor& sums, const Tensor& state, const Tensor& thresholds,
                     const Tensor& rates, const OptionalTensor& step_of_video,
                     const OptionalTensor& num_steps_of_video, const OptionalTensor& window_of_video,
                     int64_t step, int64_t num_steps, int64_t site, int64_t frames, const Integers& strides,
                     int64_t metric, int64_t rule, double elements, int64_t first_step, int64_t last_step,
                     double scale, double power, double divisor, double gradient_weight) {
  Checks checks("sums", sums);
  Decide d{};
  d.rule.motion = motion_strides(strides, frames);
  d.rule.metric = checked_metric(metric);
  d.sums = checks.packed<double>("sums", sums, ScalarType::Double);
  checks.like("state", state, ScalarType::Double);
  require(state.is_contiguous(), "state", "strides");
  checks.record("state", state, Use::written);
  VideoSchedule& shared = d.schedules.shared;
  shared.thresholds = checks.packed<double>("thresholds", thresholds, ScalarType::Double);
  shared.rates = checks.packed<double>("rates", rates, ScalarType::Double);
  d.sums_columns = sum_columns(d.rule.motion);
  require(sums.dim() == 2 && sums.size(1) == d.sums_columns, "sums", "shape");
  d.videos = sums.size(0);
  require(state.dim() == 2 && state.size(0) == d.videos && state.size(1) > first_factor_column, "state",
          "shape");
  d.state_columns = state.size(1);
  d.rule.entries = thresholds.dim() >= 1 ? thresholds.size(thresholds.dim() - 1) : 0;
  // The elements between two codebooks: [entries] or [num_videos, entries].
  const auto codebook_stride = [&](const char* argument, const Tensor& tensor) -> int64_t {
    const bool by_video = tensor.dim() == 2 && tensor.size(0) == d.videos;
    require((tensor.dim() == 1 || by_video) && tensor.size(tensor.dim() - 1) == d.rule.entries, argument,
            "shape");
    return by_video ? d.rule.entries : 0;
  };
  d.schedules.thresholds_stride = codebook_stride("thresholds", thresholds);
  require(rates.dim() == thresholds.dim(), "rates", "shape");
  d.schedules.rates_stride = codebook_stride("rates", rates);
  require(d.rule.entries >= 1, "thresholds", "shape");
  const auto by_video = [&](const char* argument, const OptionalTensor& tensor) -> const int32_t* {
    if (!tensor) return nullptr;
    require(tensor->dim() == 1 && tensor->size(0) == d.videos, argument, "shape");
    return checks.packed<int32_t>(argument, *tensor, ScalarType::Int);
  };
  d.schedules.step = by_video("step", step_of_video);
  d.schedules.num_steps = by_video("num_steps", num_steps_of_video);
  if (window_of_video) {
    require(
        window_of_video->dim() == 2 && window_of_video->size(0) == d.videos && window_of_video->size(1) == 2,
        "window", "shape");
    d.schedules.window = checks.packed<int32_t>("window", *window_of_video, ScalarType::Int);
  }
  require(site >= 0 && site < d.state_columns - first_factor_column, "site", "value");
  require(rule == 0 || rule == 1, "rule", "value");
  checks.memory();
  d.rule.rule = static_cast<Rule>(rule);
  d.rule.frames = frames;
  d.rule.elements = elements;
  d.rule.scale = scale;
  d.rule.power = power;
  d.rule.divisor = divisor;
  d.rule.gradient_weight = gradient_weight;
  shared.step = step;
  shared.num_steps = num_steps;
  shared.first_step = first_step;
  shared.last_step = last_step;
  // Values on CUDA are not read, because that would synchronize.
  if (sums.is_cpu())
    for (int64_t video = 0; video < d.videos; ++video) {
      const VideoSchedule own = schedule_of(d.schedules, video);
      require(own.num_steps >= 1, "num_steps", "value");
      require(own.step >= 1 && own.step <= own.num_steps, "step", "value");
    }
  require(step_of_video || step >= 1, "step", "value");
  require(num_steps_of_video || num_steps >= 1, "num_steps", "value");
  require(step_of_video || num_steps_of_video || step <= num_steps, "step", "value");
  d.state = static_cast<double*>(state.mutable_data_ptr());
  d.site = site;
  return d;
}

inline HeadShape head_shape(const Tensor& qkv) {
  require(qkv.dim() == 5 && qkv.size(2) == 3 && qkv.size(4) <= max_head_dim, "qkv", "shape");
  floating_dtype("qkv", qkv);
  const HeadShape shape{qkv.size(3), qkv.size(4)};
  const std::array<int64_t, 3> wanted{shape.heads * shape.dim, shape.dim, 1};
  for (int i = 0; i < 3; ++i)
    require(qkv.numel() == 0 || qkv.size(2 + i) <= 1 || qkv.stride(2 + i) == wanted[i], "qkv", "strides");
  return shape;
}

// The angles have one row per frame or per token. frames = any_number: their row count may be any divisor of
// the token count.
inline NormRope norm_rope(Checks& checks, const Tensor& qkv, const HeadArguments& arguments, int64_t frames) {
  const int64_t tokens = qkv.size(1), dim = qkv.size(4);
  require(arguments.q_weight.has_value() == arguments.k_weight.has_value(), "q_weight", "value");
  require(arguments.cos.has_value() == arguments.sin.has_value(), "cos", "value");
  NormRope p{};
  p.q_weight = checks.vector("q_weight", arguments.q_weight, dim);
  p.k_weight = checks.vector("k_weight", arguments.k_weight, dim);
  p.tokens_per_angle = 1;
  const auto angles = [&](const char* argument, const OptionalTensor& tensor) -> const float* {
    if (!tensor) return nullptr;
    const int64_t length = tensor->dim() == 2 ? tensor->size(0) : 0;
    const bool by_group = frames == any_number ? length > 0 && tokens % length == 0 : length == frames;
    require(dim % 2 == 0 && tensor->dim() == 2 && tensor->size(1) == dim / 2 &&
                (by_group || length == tokens) && length == arguments.cos->size(0),
            argument, "shape");
    p.tokens_per_angle = length > 0 ? tokens / length : 1;
    return checks.packed<float>(argument, *tensor, ScalarType::Float);
  };
  p.cos = angles("cos", arguments.cos);
  p.sin = angles("sin", arguments.sin);
  p.interleaved = arguments.interleaved;
  p.eps = checked_eps(arguments.eps);
  return p;
}

inline FusedQkNormRope fused_qk_norm_rope(Outputs<0>&, const Tensor& qkv, const OptionalTensor& q_weight,
                                          const OptionalTensor& k_weight, const OptionalTensor& cos,
                                          const OptionalTensor& sin, bool interleaved, double eps) {
  Checks checks("qkv", qkv, Use::written);
  FusedQkNormRope p{};
  p.shape = head_shape(qkv);
  p.dtype = floating_dtype("qkv", qkv);
  p.rows = qkv.size(0);
  p.tokens = qkv.size(1);
  p.strides = token_strides(qkv);
  p.norm_rope = norm_rope(checks, qkv, {q_weight, k_weight, cos, sin, interleaved, eps}, any_number);
  checks.memory();
  p.qkv = qkv.mutable_data_ptr();
  return p;
}

inline TemporalAttention temporal_attention(Outputs<1>& outputs, const Tensor& qkv,
                                            const OptionalTensor& q_weight, const OptionalTensor& k_weight,
                                            const OptionalTensor& cos, const OptionalTensor& sin,
                                            bool interleaved, int64_t frames, double eps, double scale) {
  Checks checks("qkv", qkv);
  TemporalAttention p{};
  p.shape = head_shape(qkv);
  p.dtype = floating_dtype("qkv", qkv);
  const std::array<int64_t, 3> size{qkv.size(0), qkv.size(1), p.shape.heads * p.shape.dim};
  require(frames >= 1 && frames <= max_attention_frames && size[1] % frames == 0, "frames", "value");
  p.rows = size[0];
  p.frames = frames;
  p.places = size[1] / frames;
  p.qkv = qkv.const_data_ptr();
  p.qkv_strides = token_strides(qkv);
  p.norm_rope = norm_rope(checks, qkv, {q_weight, k_weight, cos, sin, interleaved, eps}, frames);
  p.scale = static_cast<float>(scale);
  OptionalTensor& out = outputs.tensors[0];
  if (outputs.given) {
    require(out->dim() == 3 && std::equal(size.begin(), size.end(), out->sizes().begin()), "out", "shape");
    checks.like("out", *out, qkv.scalar_type());
    require_contiguous_channels("out", *out);
    checks.record("out", *out, Use::written);
  } else {
    out = torch::stable::new_empty(qkv, {size.data(), size.size()});
    if (outputs.prepare) outputs.prepare(*out);
  }
  p.out = out->mutable_data_ptr();
  p.out_strides = token_strides(*out);
  checks.memory();
  return p;
}

}  // namespace adacache::torch_checks

// The ops' arguments, checked: from tensors to the parameters of the kernels, one function per op, shared by
// the CPU and the CUDA library. An output that is null is one that the op allocates: new_out() gives it, and
// set_out() puts it into the parameters.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "../core/decide.h"
#include "../core/extrapolate_residual.h"
#include "../core/gated_residual.h"
#include "../core/gated_residual_meter.h"
#include "../core/gated_residual_norm.h"
#include "../core/gated_residual_norm_meter.h"
#include "../core/layer_norm_modulate.h"
#include "../core/residual_meter.h"
#include "../core/reuse_residual.h"
#include "../core/stack_residual_meter.h"
#include "tensor_checks.h"

namespace adacache::torch_checks {

// The arguments that all meters end with.
struct MeterArguments {
  const OptionalTensor& video_of_row;
  int64_t num_videos;
  int64_t frames;
  const std::vector<int64_t>& strides;
  int64_t metric;
};

// The arguments of a layer norm.
struct NormArguments {
  const OptionalTensor& shift;
  const OptionalTensor& scale;
  const OptionalTensor& weight;
  const OptionalTensor& bias;
  double eps;
};

// What a meter's kernel needs: its parameters, and the video that each row belongs to.
template <class Parameters>
struct Metered {
  Parameters parameters;
  const int32_t* video_of_row;  // null: all rows are video 0's
  int64_t num_videos;
};

inline int64_t batch_rows(const Tensor& x, const OptionalTensor& x_rows) {
  return x_rows && x_rows->dim() == 1 ? x_rows->size(0) : x.size(0);
}

// An output [B, N, C] that the op allocates itself: like x, or contiguous where x_rows picks its rows.
inline Tensor new_contiguous_out(const Tensor& x, const OptionalTensor& x_rows) {
  const std::array<int64_t, 3> size{batch_rows(x, x_rows), x.size(1), x.size(2)};
  return torch::stable::new_empty(x, {size.data(), size.size()});
}
inline Tensor new_out(const Tensor& x, const OptionalTensor& x_rows) {
  return x_rows ? new_contiguous_out(x, x_rows) : torch::stable::empty_like(x);
}

// Parameters is any struct with `out` and `out_strides`, and so is Norm.
template <class Parameters>
void set_out(Parameters& p, const Tensor& out) {
  p.out = out.mutable_data_ptr();
  p.out_strides = token_strides(out);
}

inline Tensor new_sums(const Tensor& like, int64_t num_videos, const MotionStrides& motion) {
  const std::array<int64_t, 2> size{num_videos, sum_columns(motion)};
  return torch::stable::new_empty(like, {size.data(), size.size()}, ScalarType::Double);
}

inline void require_tokens(const char* argument, const Tensor& tensor) {
  require(tensor.dim() == 3, argument, ": expected [B, N, C], got ", shape(tensor));
  floating_dtype(argument, tensor);
  require_contiguous_channels(argument, tensor);
}

inline TokenShape frames_of(const Tensor& tensor, int64_t rows, int64_t frames) {
  const int64_t tokens = tensor.size(1);
  require(frames >= 1, "frames: expected at least 1, got ", frames);
  require(tokens % frames == 0, "frames: expected a divisor of the number of tokens N = ", tokens, ", got ",
          frames);
  return {rows, frames, tokens / frames, tensor.size(2)};
}

// For ops without `frames`: the groups of tokens that share a gate, shift or scale take their place.
inline TokenShape groups_of(const Tensor& tensor, int64_t rows, std::initializer_list<Named> modulators) {
  const int64_t tokens = tensor.size(1);
  const Named* grouped = nullptr;
  for (const Named& modulator : modulators) {
    if (!modulator.tensor || modulator.tensor->dim() != 3) continue;
    const int64_t groups = modulator.tensor->size(1);
    if (groups <= 1 || groups >= tokens) continue;
    require(tokens % groups == 0, modulator.name, ": expected [B, 1|T|N, C] with T a divisor of N = ", tokens,
            ", got ", shape(*modulator.tensor));
    require(!grouped || grouped->tensor->size(1) == groups, modulator.name,
            ": expected [B, 1|T|N, C] with T = ", grouped ? grouped->tensor->size(1) : 0, " like ",
            grouped ? grouped->name : "", ", got ", shape(*modulator.tensor));
    grouped = &modulator;
  }
  const int64_t frames = grouped ? grouped->tensor->size(1) : 1;
  return {rows, frames, tokens / frames, tensor.size(2)};
}

inline Modulator modulator(const Named& argument, const Reference& like, const TokenShape& shape_of_batch) {
  if (!argument.tensor) return {};
  const Tensor& tensor = *argument.tensor;
  const auto& [rows, frames, places, channels] = shape_of_batch;
  const int64_t tokens = frames * places;
  const int64_t groups = tensor.dim() == 3 ? tensor.size(1) : 0;
  require(tensor.dim() == 3 && tensor.size(0) == rows && tensor.size(2) == channels &&
              (groups == 1 || groups == frames || groups == tokens),
          argument.name, ": expected [B, 1|T|N, C] = [", rows, ", 1|", frames, "|", tokens, ", ", channels,
          "], got ", shape(tensor));
  require_device(argument.name, tensor, like.name, like.tensor);
  require_dtype_like(argument.name, tensor, like.name, like.tensor);
  require_contiguous_channels(argument.name, tensor);
  const int64_t stride = tensor.stride(1);
  const void* data = tensor.const_data_ptr();
  if (groups == 1) return {data, tensor.stride(0), 0, 0};
  if (groups == frames) return {data, tensor.stride(0), stride, 0};
  return {data, tensor.stride(0), stride * places, stride};
}

inline MotionStrides motion_strides(const std::vector<int64_t>& strides, int64_t frames) {
  require(strides.size() <= max_motion_strides, "strides: expected at most ", max_motion_strides, ", got ",
          strides.size());
  MotionStrides motion{};
  for (const int64_t stride : strides) {
    require(stride >= 1 && stride < frames, "strides: expected each from 1 to frames - 1 = ", frames - 1,
            ", got ", stride);
    motion.stride[motion.count++] = static_cast<int>(stride);
  }
  return motion;
}

inline Metric checked_metric(int64_t metric) {
  require(metric >= 0 && metric <= 2, "metric: expected 0 (l1), 1 (l2) or 2 (cosine), got ", metric);
  return static_cast<Metric>(metric);
}

// Ids and indices are checked where they can be read without waiting: on the CPU.
inline const int32_t* checked_video_of_row(const OptionalTensor& video_of_row, const Reference& like,
                                           int64_t rows, int64_t num_videos) {
  require(num_videos >= 1, "num_videos: expected at least 1, got ", num_videos);
  if (!video_of_row) {
    require(num_videos == 1, "video_of_row: expected [B] int32 with num_videos = ", num_videos, ", got None");
    return nullptr;
  }
  const int32_t* ids = checked_indices("video_of_row", *video_of_row, rows, like);
  if (like.tensor.is_cpu())
    for (int64_t row = 0; row < rows; ++row)
      require(ids[row] >= 0 && ids[row] < num_videos,
              "video_of_row: expected ids from 0 to num_videos - 1 = ", num_videos - 1, ", got ", ids[row],
              " for row ", row);
  return ids;
}

enum class RowUse { read, written };

// The rows of a tensor of `total` rows that the batch takes; `rows` is B, or any_number where the index
// itself says how many there are.
inline RowIndex row_index(const Named& argument, int64_t rows, const Reference& like, int64_t total,
                          RowUse use) {
  if (!argument.tensor) return {nullptr, total};
  const int32_t* picked = checked_indices(argument.name, *argument.tensor, rows, like);
  if (!argument.tensor->is_cpu()) return {picked, total};
  std::vector<int32_t> sorted(picked, picked + argument.tensor->size(0));
  for (const int32_t row : sorted)
    require(row >= 0 && row < total, argument.name, ": expected rows from 0 to ", total - 1, ", got ", row);
  std::sort(sorted.begin(), sorted.end());
  const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
  require(use == RowUse::read || twice == sorted.end(), argument.name,
          ": expected different rows, since they are written, got ", twice == sorted.end() ? 0 : *twice,
          " more than once");
  return {picked, total};
}

// A kept residual of x: of x's dtype or float8, where it is only read of any dtype that tensors can have.
inline Cache cache(const Tensor& residual, const OptionalTensor& scale, const Named& rows, RowUse use,
                   const Reference& like, int64_t batch) {
  Cache c{};
  c.strides = tokens_like("residual", residual, like, rows.tensor ? any_number : batch);
  const ScalarType dtype = residual.scalar_type();
  if (dtype == ScalarType::Float8_e4m3fn) {
    c.dtype = DType::float8_e4m3;
  } else if (use == RowUse::read) {
    require(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
            "residual: expected float32, bfloat16, float16 or float8_e4m3fn, got ", name(dtype));
    c.dtype = floating_dtype("residual", residual);
  } else {
    require(dtype == like.tensor.scalar_type(), "residual: expected ", name(like.tensor.scalar_type()),
            " like ", like.name, " or float8_e4m3fn, got ", name(dtype));
    c.dtype = floating_dtype("residual", residual);
  }
  c.rows = row_index(rows, batch, like, residual.size(0), use);
  if (scale) {
    require(c.dtype == DType::float8_e4m3, "residual_scale: expected None for a residual of ", name(dtype),
            ", got ", shape(*scale));
    require(scale->dim() == 2 && scale->size(0) == residual.size(0) && scale->size(1) == residual.size(1),
            "residual_scale: expected [rows of residual, N] = [", residual.size(0), ", ", residual.size(1),
            "], got ", shape(*scale));
    require_dtype("residual_scale", *scale, ScalarType::Float);
    require_device("residual_scale", *scale, like.name, like.tensor);
    c.scale_strides = token_strides(*scale);
  } else {
    require(
        c.dtype != DType::float8_e4m3,
        "residual_scale: expected float32 [rows of residual, N] for a residual of float8_e4m3fn, got None");
  }
  if (use == RowUse::written) {
    c.data = residual.mutable_data_ptr();
    if (scale) c.scale = static_cast<float*>(scale->mutable_data_ptr());
  } else {
    c.data = const_cast<void*>(residual.const_data_ptr());
    if (scale) c.scale = const_cast<float*>(static_cast<const float*>(scale->const_data_ptr()));
  }
  return c;
}

// Where an output is put; null: the op will allocate it.
template <class Parameters>
void check_out(Parameters& p, const char* argument, const Tensor* out, const Reference& like, int64_t rows) {
  if (!out) return;
  tokens_and_dtype_like(argument, *out, like, rows);
  set_out(p, *out);
}

inline Norm norm(const NormArguments& arguments, const Reference& like, const TokenShape& shape_of_batch) {
  Norm n{};
  n.shift = modulator({"shift", arguments.shift}, like, shape_of_batch);
  n.scale = modulator({"scale", arguments.scale}, like, shape_of_batch);
  const auto by_channel = [&](const char* argument, const OptionalTensor& tensor) -> const void* {
    if (!tensor) return nullptr;
    require(tensor->dim() == 1 && tensor->size(0) == shape_of_batch.channels, argument, ": expected [C] = [",
            shape_of_batch.channels, "], got ", shape(*tensor));
    require_device(argument, *tensor, like.name, like.tensor);
    require_dtype_like(argument, *tensor, like.name, like.tensor);
    require_contiguous(argument, *tensor);
    return tensor->const_data_ptr();
  };
  n.weight = by_channel("weight", arguments.weight);
  n.bias = by_channel("bias", arguments.bias);
  require(arguments.eps >= 0, "eps: expected at least 0, got ", arguments.eps);
  n.eps = static_cast<float>(arguments.eps);
  return n;
}

// What all meters have in common: sets what they measure.
template <class Parameters>
Metered<Parameters> metered(Parameters p, const MeterArguments& meter, const Reference& like) {
  p.motion = motion_strides(meter.strides, meter.frames);
  p.all_columns = checked_metric(meter.metric) != Metric::l1;
  return {p, checked_video_of_row(meter.video_of_row, like, p.shape.rows, meter.num_videos),
          meter.num_videos};
}

// What the ops x + gate * y have in common: Parameters is GatedResidual or GatedResidualMeter.
template <class Parameters>
Parameters gated_residual_parameters(const Tensor& x, const Tensor& y, const OptionalTensor& gate,
                                     const OptionalTensor& x_rows, const TokenShape& shape_of_batch,
                                     const Tensor* out) {
  const Reference like{"x", x};
  Parameters p{};
  p.shape = shape_of_batch;
  p.dtype = floating_dtype("x", x);
  p.x = x.const_data_ptr();
  p.x_strides = token_strides(x);
  p.x_rows = row_index({"x_rows", x_rows}, any_number, like, x.size(0), RowUse::read);
  p.y_strides = tokens_and_dtype_like("y", y, like, p.shape.rows);
  p.y = y.const_data_ptr();
  p.gate = modulator({"gate", gate}, like, p.shape);
  check_out(p, "out", out, like, p.shape.rows);
  return p;
}

inline GatedResidual gated_residual(const Tensor& x, const Tensor& y, const OptionalTensor& gate,
                                    const OptionalTensor& x_rows, const Tensor* out) {
  require_tokens("x", x);
  const TokenShape groups = groups_of(x, batch_rows(x, x_rows), {{"gate", gate}});
  const auto p = gated_residual_parameters<GatedResidual>(x, y, gate, x_rows, groups, out);
  require_own_memory({{"out", out, x_rows ? nullptr : &x}},
                     {{"x", x}, {"y", y}, {"gate", gate}, {"x_rows", x_rows}});
  return p;
}

// gated_residual_meter but for the memory.
inline Metered<GatedResidualMeter> gated_residual_meter_parameters(
    const Tensor& x, const Tensor& y, const OptionalTensor& gate, const Tensor& residual,
    const OptionalTensor& residual_scale, const OptionalTensor& x_rows, const OptionalTensor& residual_rows,
    const MeterArguments& meter, const Tensor* out) {
  require_tokens("x", x);
  const int64_t rows = batch_rows(x, x_rows);
  auto p = gated_residual_parameters<GatedResidualMeter>(x, y, gate, x_rows, frames_of(x, rows, meter.frames),
                                                         out);
  p.residual =
      cache(residual, residual_scale, {"residual_rows", residual_rows}, RowUse::written, {"x", x}, rows);
  return metered(p, meter, {"x", x});
}

inline Metered<GatedResidualMeter> gated_residual_meter(const Tensor& x, const Tensor& y,
                                                        const OptionalTensor& gate, const Tensor& residual,
                                                        const OptionalTensor& residual_scale,
                                                        const OptionalTensor& x_rows,
                                                        const OptionalTensor& residual_rows,
                                                        const MeterArguments& meter, const Tensor* out) {
  const auto p = gated_residual_meter_parameters(x, y, gate, residual, residual_scale, x_rows, residual_rows,
                                                 meter, out);
  require_own_memory(
      {{"residual", residual}, {"residual_scale", residual_scale}, {"out", out, x_rows ? nullptr : &x}},
      {{"x", x},
       {"y", y},
       {"gate", gate},
       {"x_rows", x_rows},
       {"residual_rows", residual_rows},
       {"video_of_row", meter.video_of_row}});
  return p;
}

inline Metered<StackResidualMeter> stack_residual_meter(const Tensor& x_out, const Tensor& x_in,
                                                        const Tensor& residual,
                                                        const OptionalTensor& residual_scale,
                                                        const OptionalTensor& rows,
                                                        const MeterArguments& meter, const Tensor* out) {
  require_tokens("x_out", x_out);
  const Reference like{"x_out", x_out};
  const int64_t batch = x_out.size(0);
  StackResidualMeter p{};
  p.shape = frames_of(x_out, batch, meter.frames);
  p.dtype = floating_dtype("x_out", x_out);
  p.x_out = x_out.const_data_ptr();
  p.x_out_strides = token_strides(x_out);
  p.x_in_strides = tokens_and_dtype_like("x_in", x_in, like, rows ? any_number : batch);
  p.x_in = x_in.const_data_ptr();
  p.residual = cache(residual, residual_scale, {"rows", rows}, RowUse::written, like, batch);
  p.rows = p.residual.rows;
  require(residual.size(0) == x_in.size(0), "residual: expected [rows, N, C] = ", shape(x_in),
          " like x_in, got ", shape(residual));
  check_out(p, "out", out, like, x_in.size(0));
  require_own_memory(
      {{"residual", residual}, {"residual_scale", residual_scale}, {"out", out, &x_in}},
      {{"x_out", x_out}, {"x_in", x_in}, {"rows", rows}, {"video_of_row", meter.video_of_row}});
  return metered(p, meter, like);
}

inline Metered<ResidualMeter> residual_meter(const Tensor& residual, const Tensor& old,
                                             const MeterArguments& meter) {
  require_tokens("residual", residual);
  const Reference like{"residual", residual};
  ResidualMeter p{};
  p.shape = frames_of(residual, residual.size(0), meter.frames);
  p.dtype = floating_dtype("residual", residual);
  p.residual = residual.const_data_ptr();
  p.residual_strides = token_strides(residual);
  p.old_strides = tokens_and_dtype_like("old", old, like, residual.size(0));
  p.old = old.const_data_ptr();
  return metered(p, meter, like);
}

// What reuse_residual and extrapolate_residual have in common.
template <class Parameters>
Parameters stream_parameters(const Tensor& x, const OptionalTensor& x_rows, const Tensor* out) {
  require_tokens("x", x);
  Parameters p{};
  p.rows = batch_rows(x, x_rows);
  p.tokens = x.size(1);
  p.channels = x.size(2);
  p.dtype = floating_dtype("x", x);
  p.x = x.const_data_ptr();
  p.x_strides = token_strides(x);
  p.x_rows = row_index({"x_rows", x_rows}, any_number, {"x", x}, x.size(0), RowUse::read);
  check_out(p, "out", out, {"x", x}, p.rows);
  return p;
}

inline ReuseResidual reuse_residual(const Tensor& x, const Tensor& residual,
                                    const OptionalTensor& residual_scale, const OptionalTensor& x_rows,
                                    const OptionalTensor& residual_rows, const OptionalTensor& video_of_row,
                                    const OptionalTensor& reuse, const Tensor* out) {
  auto p = stream_parameters<ReuseResidual>(x, x_rows, out);
  const Reference like{"x", x};
  p.residual = cache(residual, residual_scale, {"residual_rows", residual_rows}, RowUse::read, like, p.rows);
  p.videos = 1;
  if (reuse) {
    require(reuse->dim() == 1, "reuse: expected [num_videos], got ", shape(*reuse));
    require_dtype("reuse", *reuse, ScalarType::Bool);
    require_device("reuse", *reuse, "x", x);
    require_contiguous("reuse", *reuse);
    p.videos = reuse->size(0);
    require(video_of_row || p.videos == 1 || p.videos == p.rows, "reuse: expected 1 or B = ", p.rows,
            " entries without video_of_row, got ", p.videos);
    p.reuse = static_cast<const bool*>(reuse->const_data_ptr());
    if (video_of_row) p.video_of_row = checked_video_of_row(video_of_row, like, p.rows, p.videos);
  }
  require_own_memory({{"out", out, x_rows ? nullptr : &x}}, {{"x", x},
                                                             {"residual", residual},
                                                             {"residual_scale", residual_scale},
                                                             {"x_rows", x_rows},
                                                             {"residual_rows", residual_rows},
                                                             {"video_of_row", video_of_row},
                                                             {"reuse", reuse}});
  return p;
}

inline ExtrapolateResidual extrapolate_residual(const Tensor& x, const std::vector<Tensor>& factors,
                                                const Tensor& coefficients, const OptionalTensor& x_rows,
                                                const OptionalTensor& residual_rows,
                                                const OptionalTensor& video_of_row, const Tensor* out) {
  auto p = stream_parameters<ExtrapolateResidual>(x, x_rows, out);
  const Reference like{"x", x};
  require(factors.size() >= 1 && factors.size() <= max_factors, "factors: expected 1 to ", max_factors,
          " tensors, got ", factors.size());
  p.factors = static_cast<int>(factors.size());
  const int64_t factor_rows = residual_rows && factors[0].dim() == 3 ? factors[0].size(0) : p.rows;
  constexpr const char* names[max_factors] = {"factors[0]", "factors[1]", "factors[2]", "factors[3]"};
  p.factor_dtype = floating_dtype("factors[0]", factors[0]);
  for (int i = 0; i < p.factors; ++i) {
    const char* argument = names[i];
    p.factor_strides[i] = tokens_like(argument, factors[i], like, factor_rows);
    require_dtype_like(argument, factors[i], "factors[0]", factors[0]);
    p.factor[i] = factors[i].const_data_ptr();
  }
  p.factor_rows = row_index({"residual_rows", residual_rows}, p.rows, like, factor_rows, RowUse::read);
  require(coefficients.dim() == 2 && coefficients.size(1) == p.factors,
          "coefficients: expected [num_videos, factors] = [num_videos, ", p.factors, "], got ",
          shape(coefficients));
  require_dtype("coefficients", coefficients, ScalarType::Float);
  require_device("coefficients", coefficients, "x", x);
  require_contiguous("coefficients", coefficients);
  p.coefficients = static_cast<const float*>(coefficients.const_data_ptr());
  p.videos = coefficients.size(0);
  require(video_of_row || p.videos == 1 || p.videos == p.rows, "coefficients: expected 1 or B = ", p.rows,
          " rows without video_of_row, got ", p.videos);
  if (video_of_row) p.video_of_row = checked_video_of_row(video_of_row, like, p.rows, p.videos);
  const auto factor = [&](size_t i) { return i < factors.size() ? &factors[i] : nullptr; };
  require_own_memory({{"out", out, x_rows ? nullptr : &x}}, {{"x", x},
                                                             {names[0], factor(0)},
                                                             {names[1], factor(1)},
                                                             {names[2], factor(2)},
                                                             {names[3], factor(3)},
                                                             {"coefficients", coefficients},
                                                             {"x_rows", x_rows},
                                                             {"residual_rows", residual_rows},
                                                             {"video_of_row", video_of_row}});
  return p;
}

inline LayerNormModulate layer_norm_modulate(const Tensor& x, const NormArguments& n,
                                             const OptionalTensor& x_rows, const Tensor* out) {
  require_tokens("x", x);
  const Reference like{"x", x};
  LayerNormModulate p{};
  p.shape = groups_of(x, batch_rows(x, x_rows), {{"shift", n.shift}, {"scale", n.scale}});
  p.dtype = floating_dtype("x", x);
  p.x = x.const_data_ptr();
  p.x_strides = token_strides(x);
  p.x_rows = row_index({"x_rows", x_rows}, any_number, like, x.size(0), RowUse::read);
  p.norm = norm(n, like, p.shape);
  check_out(p.norm, "out", out, like, p.shape.rows);
  require_own_memory({{"out", out, x_rows ? nullptr : &x}}, {{"x", x},
                                                             {"shift", n.shift},
                                                             {"scale", n.scale},
                                                             {"weight", n.weight},
                                                             {"bias", n.bias},
                                                             {"x_rows", x_rows}});
  return p;
}

// out and norm_out are both given or both null.
inline GatedResidualNorm gated_residual_norm(const Tensor& x, const Tensor& y, const OptionalTensor& gate,
                                             const NormArguments& n, const OptionalTensor& x_rows,
                                             const Tensor* out, const Tensor* norm_out) {
  require_tokens("x", x);
  const TokenShape groups =
      groups_of(x, batch_rows(x, x_rows), {{"gate", gate}, {"shift", n.shift}, {"scale", n.scale}});
  GatedResidualNorm p{};
  p.residual = gated_residual_parameters<GatedResidual>(x, y, gate, x_rows, groups, out);
  p.norm = norm(n, {"x", x}, groups);
  check_out(p.norm, "norm_out", norm_out, {"x", x}, groups.rows);
  require_own_memory({{"out", out, x_rows ? nullptr : &x}, {"norm_out", norm_out}}, {{"x", x},
                                                                                     {"y", y},
                                                                                     {"gate", gate},
                                                                                     {"shift", n.shift},
                                                                                     {"scale", n.scale},
                                                                                     {"weight", n.weight},
                                                                                     {"bias", n.bias},
                                                                                     {"x_rows", x_rows}});
  return p;
}

// out and norm_out are both given or both null.
inline Metered<GatedResidualNormMeter> gated_residual_norm_meter(
    const Tensor& x, const Tensor& y, const OptionalTensor& gate, const Tensor& residual,
    const OptionalTensor& residual_scale, const NormArguments& n, const OptionalTensor& x_rows,
    const OptionalTensor& residual_rows, const MeterArguments& meter, const Tensor* out,
    const Tensor* norm_out) {
  const auto m = gated_residual_meter_parameters(x, y, gate, residual, residual_scale, x_rows, residual_rows,
                                                 meter, out);
  GatedResidualNormMeter p{m.parameters, norm(n, {"x", x}, m.parameters.shape)};
  check_out(p.norm, "norm_out", norm_out, {"x", x}, m.parameters.shape.rows);
  require_own_memory({{"residual", residual},
                      {"residual_scale", residual_scale},
                      {"out", out, x_rows ? nullptr : &x},
                      {"norm_out", norm_out}},
                     {{"x", x},
                      {"y", y},
                      {"gate", gate},
                      {"shift", n.shift},
                      {"scale", n.scale},
                      {"weight", n.weight},
                      {"bias", n.bias},
                      {"x_rows", x_rows},
                      {"residual_rows", residual_rows},
                      {"video_of_row", meter.video_of_row}});
  return {p, m.video_of_row, m.num_videos};
}

struct Decide {
  DecisionRule rule;
  const double* sums;
  double* state;
  int64_t videos, state_columns, sums_columns;
};

inline Decide decide(const Tensor& sums, const Tensor& state, const Tensor& thresholds, const Tensor& rates,
                     int64_t step, int64_t num_steps, int64_t site, int64_t frames,
                     const std::vector<int64_t>& strides, int64_t metric, int64_t rule, double elements,
                     int64_t first_step, int64_t last_step, double scale, double power, double divisor,
                     double gradient_weight) {
  Decide d{};
  d.rule.motion = motion_strides(strides, frames);
  d.rule.metric = checked_metric(metric);
  const std::pair<const char*, const Tensor*> tensors[] = {
      {"sums", &sums}, {"state", &state}, {"thresholds", &thresholds}, {"rates", &rates}};
  for (const auto& [argument, tensor] : tensors) {
    require_device(argument, *tensor, "sums", sums);
    require_dtype(argument, *tensor, ScalarType::Double);
    require_contiguous(argument, *tensor);
  }
  d.sums_columns = sum_columns(d.rule.motion);
  require(sums.dim() == 2 && sums.size(1) == d.sums_columns, "sums: expected [num_videos, ", d.sums_columns,
          "] for ", strides.size(), " strides, got ", shape(sums));
  d.videos = sums.size(0);
  require(state.dim() == 2 && state.size(0) == d.videos && state.size(1) > first_factor_column,
          "state: expected [num_videos, ", +first_factor_column, " + sites] = [", d.videos, ", more than ",
          +first_factor_column, "], got ", shape(state));
  d.state_columns = state.size(1);
  require(thresholds.dim() == 1 && thresholds.size(0) >= 1,
          "thresholds: expected at least one, in one dimension, got ", shape(thresholds));
  require(rates.dim() == 1 && rates.size(0) == thresholds.size(0), "rates: expected [", thresholds.size(0),
          "] like thresholds, got ", shape(rates));
  require(num_steps >= 1, "num_steps: expected at least 1, got ", num_steps);
  require(step >= 1 && step <= num_steps, "step: expected 1 to num_steps = ", num_steps, ", got ", step);
  require(site >= 0 && site < d.state_columns - first_factor_column, "site: expected 0 to ",
          d.state_columns - first_factor_column - 1, ", got ", site);
  require(rule == 0 || rule == 1, "rule: expected 0 (published) or 1 (paper), got ", rule);
  d.rule.rule = static_cast<Rule>(rule);
  d.rule.thresholds = static_cast<const double*>(thresholds.const_data_ptr());
  d.rule.rates = static_cast<const double*>(rates.const_data_ptr());
  d.rule.entries = thresholds.size(0);
  d.rule.num_steps = num_steps;
  d.rule.frames = frames;
  d.rule.elements = elements;
  d.rule.first_step = first_step;
  d.rule.last_step = last_step;
  d.rule.scale = scale;
  d.rule.power = power;
  d.rule.divisor = divisor;
  d.rule.gradient_weight = gradient_weight;
  d.sums = static_cast<const double*>(sums.const_data_ptr());
  d.state = static_cast<double*>(state.mutable_data_ptr());
  return d;
}

}  // namespace adacache::torch_checks

// Argument checks of the ops, shared by the CPU and the CUDA library: from tensors to the parameters of the
// kernels. Only the stable ABI of LibTorch is used: no ATen, no c10, no Python.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../core/decide.h"
#include "../core/gated_residual_meter.h"
#include "../core/residual_meter.h"
#include "../core/reuse_residual.h"

namespace adacache::torch_checks {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

template <class Values>
std::string list(const Values& values) {
  std::ostringstream text;
  text << '[';
  for (size_t i = 0; i < values.size(); ++i) text << (i ? ", " : "") << values[i];
  text << ']';
  return text.str();
}

inline std::string shape(const Tensor& tensor) { return list(tensor.sizes()); }

inline std::string name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(dtype);
  }
}

inline std::string device_name(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  if (tensor.is_cuda()) return "cuda:" + std::to_string(tensor.get_device_index());
  return "another kind of device";
}

inline void require_device(const char* argument, const Tensor& tensor, const char* like,
                           const Tensor& other) {
  const bool same = tensor.is_cpu() == other.is_cpu() && tensor.is_cuda() == other.is_cuda() &&
                    tensor.get_device_index() == other.get_device_index();
  require(same, argument, ": expected a tensor on ", device_name(other), " like ", like, ", got one on ",
          device_name(tensor));
}

inline void require_dtype(const char* argument, const Tensor& tensor, ScalarType dtype) {
  require(tensor.scalar_type() == dtype, argument, ": expected ", name(dtype), ", got ",
          name(tensor.scalar_type()));
}

inline DType floating_dtype(const char* argument, const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  require(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, argument,
          ": expected float32, bfloat16 or float16, got ", name(dtype));
  return dtype == ScalarType::Float      ? DType::float32
         : dtype == ScalarType::BFloat16 ? DType::bfloat16
                                         : DType::float16;
}

inline int64_t element_bytes(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

inline void require_contiguous_channels(const char* argument, const Tensor& tensor) {
  require(tensor.size(2) <= 1 || tensor.stride(2) == 1, argument,
          ": expected channels contiguous in memory (stride 1 in the last dimension), got strides ",
          list(tensor.strides()));
}

inline TokenStrides token_strides(const Tensor& tensor) { return {tensor.stride(0), tensor.stride(1)}; }

// A tensor [rows, tokens, channels] of the dtype and device of `like`.
inline TokenStrides tokens_like(const char* argument, const Tensor& tensor, const char* like,
                                const Tensor& other, bool same_dtype = true) {
  require(tensor.dim() == 3 && tensor.size(0) == other.size(0) && tensor.size(1) == other.size(1) &&
              tensor.size(2) == other.size(2),
          argument, ": expected [B, N, C] = ", shape(other), " like ", like, ", got ", shape(tensor));
  require_device(argument, tensor, like, other);
  if (same_dtype)
    require(tensor.scalar_type() == other.scalar_type(), argument, ": expected ", name(other.scalar_type()),
            " like ", like, ", got ", name(tensor.scalar_type()));
  require_contiguous_channels(argument, tensor);
  return token_strides(tensor);
}

inline MeterShape meter_shape(const char* argument, const Tensor& tensor, int64_t frames) {
  require(tensor.dim() == 3, argument, ": expected [B, N, C], got ", shape(tensor));
  floating_dtype(argument, tensor);
  require_contiguous_channels(argument, tensor);
  const int64_t tokens = tensor.size(1);
  require(frames >= 1, "frames: expected at least 1, got ", frames);
  require(tokens % frames == 0, "frames: expected a divisor of the number of tokens N = ", tokens, ", got ",
          frames);
  return {tensor.size(0), frames, tokens / frames, tensor.size(2)};
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

// The ids are checked where they can be read without waiting: on the CPU.
inline const int32_t* checked_video_of_row(const std::optional<Tensor>& video_of_row, const char* like,
                                           const Tensor& tensor, int64_t num_videos) {
  require(num_videos >= 1, "num_videos: expected at least 1, got ", num_videos);
  if (!video_of_row) {
    require(num_videos == 1, "video_of_row: expected [B] int32 with num_videos = ", num_videos, ", got None");
    return nullptr;
  }
  const int64_t rows = tensor.size(0);
  require(video_of_row->dim() == 1 && video_of_row->size(0) == rows, "video_of_row: expected [B] = [", rows,
          "], got ", shape(*video_of_row));
  require_dtype("video_of_row", *video_of_row, ScalarType::Int);
  require_device("video_of_row", *video_of_row, like, tensor);
  require(rows <= 1 || video_of_row->stride(0) == 1,
          "video_of_row: expected a contiguous tensor, got strides ", list(video_of_row->strides()));
  const auto* ids = static_cast<const int32_t*>(video_of_row->const_data_ptr());
  if (tensor.is_cpu())
    for (int64_t row = 0; row < rows; ++row)
      require(ids[row] >= 0 && ids[row] < num_videos,
              "video_of_row: expected ids from 0 to num_videos - 1 = ", num_videos - 1, ", got ", ids[row],
              " for row ", row);
  return ids;
}

// Whether two elements of one tensor can share an address. Conservative for exotic strides, exact for views
// that slicing, chunking, transposing and expanding give.
inline bool overlaps_itself(const Tensor& tensor) {
  std::vector<std::pair<int64_t, int64_t>> dimensions;  // stride, size
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    if (tensor.size(i) == 0) return false;
    if (tensor.size(i) > 1) dimensions.emplace_back(tensor.stride(i), tensor.size(i));
  }
  std::sort(dimensions.begin(), dimensions.end());
  int64_t extent = 1;
  for (const auto& [stride, size] : dimensions) {
    if (stride < extent) return true;
    extent = stride * (size - 1) + extent;
  }
  return false;
}

// Whether two tensors share memory. Views of one buffer with equal strides, such as the halves that chunk()
// gives, are told apart; other views whose address ranges cross are taken to share.
inline bool share_memory(const Tensor& a, const Tensor& b) {
  if (a.numel() == 0 || b.numel() == 0) return false;
  const auto range = [](const Tensor& tensor) {
    int64_t last = 0;
    for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
    const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
    return std::pair<uintptr_t, uintptr_t>(begin, begin + (last + 1) * tensor.element_size());
  };
  const auto [a_begin, a_end] = range(a);
  const auto [b_begin, b_end] = range(b);
  if (a_end <= b_begin || b_end <= a_begin) return false;
  const int64_t bytes = static_cast<int64_t>(a.element_size());
  const int64_t distance_bytes = static_cast<int64_t>(b_begin) - static_cast<int64_t>(a_begin);
  const bool comparable = a.dim() == 3 && b.dim() == 3 && bytes == static_cast<int64_t>(b.element_size()) &&
                          a.stride(0) == b.stride(0) && a.stride(1) == b.stride(1) &&
                          distance_bytes % bytes == 0 && a.size(0) == b.size(0) && a.size(1) == b.size(1) &&
                          a.size(2) == b.size(2);
  if (!comparable) return true;
  // They meet where distance = i * stride(0) + j * stride(1) + k with each index difference smaller than its
  // size.
  const int64_t distance = distance_bytes / bytes;
  std::array<std::pair<int64_t, int64_t>, 2> outer{{{a.stride(0), a.size(0)}, {a.stride(1), a.size(1)}}};
  if (outer[0].first < outer[1].first) std::swap(outer[0], outer[1]);
  const auto candidates = [](int64_t rest, std::pair<int64_t, int64_t> dimension) {
    std::vector<int64_t> found;
    if (dimension.second == 1 || dimension.first == 0) return std::vector<int64_t>{0};
    const int64_t floor = rest / dimension.first - (rest % dimension.first < 0 ? 1 : 0);
    for (const int64_t i : {floor, floor + 1})
      if (i > -dimension.second && i < dimension.second) found.push_back(i);
    return found;
  };
  for (const int64_t i : candidates(distance, outer[0])) {
    const int64_t rest = distance - i * outer[0].first;
    for (const int64_t j : candidates(rest, outer[1])) {
      const int64_t channel = rest - j * outer[1].first;
      if (channel > -a.size(2) && channel < a.size(2)) return true;
    }
  }
  return false;
}

inline void require_separate(const char* written, const Tensor& a, const char* other, const Tensor& b) {
  require(!share_memory(a, b), written, ": expected memory of its own, but it overlaps ", other);
}

inline void require_writable(const char* argument, const Tensor& tensor) {
  require(!overlaps_itself(tensor), argument,
          ": is written and so needs an address of its own for each element, got strides ",
          list(tensor.strides()), " for ", shape(tensor));
}

inline bool same_view(const Tensor& a, const Tensor& b) {
  return a.const_data_ptr() == b.const_data_ptr() && a.stride(0) == b.stride(0) && a.stride(1) == b.stride(1);
}

inline GatedResidualMeter gated_residual_meter(const Tensor& x, const Tensor& y, const Tensor& gate,
                                               const Tensor& residual, int64_t frames,
                                               const std::vector<int64_t>& strides, int64_t metric,
                                               const Tensor* out) {
  GatedResidualMeter p{};
  p.shape = meter_shape("x", x, frames);
  p.dtype = floating_dtype("x", x);
  p.motion = motion_strides(strides, frames);
  p.all_columns = checked_metric(metric) != Metric::l1;
  p.x_strides = token_strides(x);
  p.y_strides = tokens_like("y", y, "x", x);
  p.residual_strides = tokens_like("residual", residual, "x", x);
  const int64_t tokens = x.size(1);
  const int64_t groups = gate.dim() == 3 ? gate.size(1) : 0;
  require(gate.dim() == 3 && gate.size(0) == x.size(0) && gate.size(2) == x.size(2) &&
              (groups == 1 || groups == frames || groups == tokens),
          "gate: expected [B, 1|T|N, C] = [", x.size(0), ", 1|", frames, "|", tokens, ", ", x.size(2),
          "], got ", shape(gate));
  require_device("gate", gate, "x", x);
  require(gate.scalar_type() == x.scalar_type(), "gate: expected ", name(x.scalar_type()), " like x, got ",
          name(gate.scalar_type()));
  require_contiguous_channels("gate", gate);
  p.gate_batch = gate.stride(0);
  if (groups == 1) {
    p.gate_frame = p.gate_place = 0;
  } else if (groups == frames) {
    p.gate_frame = gate.stride(1);
    p.gate_place = 0;
  } else {
    p.gate_frame = gate.stride(1) * p.shape.places;
    p.gate_place = gate.stride(1);
  }
  require_writable("residual", residual);
  require_separate("residual", residual, "x", x);
  require_separate("residual", residual, "y", y);
  require_separate("residual", residual, "gate", gate);
  if (out != nullptr) {
    p.out_strides = tokens_like("out", *out, "x", x);
    require_writable("out", *out);
    require_separate("out", *out, "residual", residual);
    require_separate("out", *out, "y", y);
    require_separate("out", *out, "gate", gate);
    require(same_view(*out, x) || !share_memory(*out, x),
            "out: expected x itself or memory of its own, but it overlaps x");
    p.out = out->mutable_data_ptr();
  }
  p.x = x.const_data_ptr();
  p.y = y.const_data_ptr();
  p.gate = gate.const_data_ptr();
  p.residual = residual.mutable_data_ptr();
  return p;
}

inline ResidualMeter residual_meter(const Tensor& residual, const Tensor& old, int64_t frames,
                                    const std::vector<int64_t>& strides, int64_t metric) {
  ResidualMeter p{};
  p.shape = meter_shape("residual", residual, frames);
  p.dtype = floating_dtype("residual", residual);
  p.motion = motion_strides(strides, frames);
  p.all_columns = checked_metric(metric) != Metric::l1;
  p.residual_strides = token_strides(residual);
  p.old_strides = tokens_like("old", old, "residual", residual);
  p.residual = residual.const_data_ptr();
  p.old = old.const_data_ptr();
  return p;
}

inline ReuseResidual reuse_residual(const Tensor& x, const Tensor& residual,
                                    const std::optional<Tensor>& video_of_row,
                                    const std::optional<Tensor>& reuse, const Tensor* out) {
  require(x.dim() == 3, "x: expected [B, N, C], got ", shape(x));
  ReuseResidual p{};
  p.dtype = floating_dtype("x", x);
  require_contiguous_channels("x", x);
  p.x_strides = token_strides(x);
  p.residual_strides = tokens_like("residual", residual, "x", x, /*same_dtype=*/false);
  p.residual_dtype = floating_dtype("residual", residual);
  p.rows = x.size(0);
  p.tokens = x.size(1);
  p.channels = x.size(2);
  p.videos = 1;
  if (reuse) {
    require(reuse->dim() == 1, "reuse: expected [num_videos], got ", shape(*reuse));
    require_dtype("reuse", *reuse, ScalarType::Bool);
    require_device("reuse", *reuse, "x", x);
    p.videos = reuse->size(0);
    require(p.videos <= 1 || reuse->stride(0) == 1, "reuse: expected a contiguous tensor, got strides ",
            list(reuse->strides()));
    require(video_of_row || p.videos == 1 || p.videos == p.rows, "reuse: expected 1 or B = ", p.rows,
            " entries without video_of_row, got ", p.videos);
    p.reuse = static_cast<const bool*>(reuse->const_data_ptr());
    if (video_of_row) p.video_of_row = checked_video_of_row(video_of_row, "x", x, p.videos);
  }
  if (out != nullptr) {
    p.out_strides = tokens_like("out", *out, "x", x);
    require_writable("out", *out);
    require_separate("out", *out, "residual", residual);
    require(same_view(*out, x) || !share_memory(*out, x),
            "out: expected x itself or memory of its own, but it overlaps x");
    p.out = out->mutable_data_ptr();
  }
  p.x = x.const_data_ptr();
  p.residual = residual.const_data_ptr();
  return p;
}

// An output like x that the op has allocated itself.
template <class Parameters>
void set_fresh_out(Parameters& p, const Tensor& out) {
  p.out = out.mutable_data_ptr();
  p.out_strides = token_strides(out);
}

inline Tensor new_sums(const Tensor& like, int64_t num_videos, const MotionStrides& motion) {
  const std::array<int64_t, 2> size{num_videos, sum_columns(motion)};
  return torch::stable::new_empty(like, {size.data(), size.size()}, ScalarType::Double);
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
    require(tensor->is_contiguous(), argument, ": expected a contiguous tensor, got strides ",
            list(tensor->strides()));
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

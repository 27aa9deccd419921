// SPDX-License-Identifier: Apache-2.0
// Checks of op arguments by role, on the stable ABI of LibTorch. They throw "<argument>: unexpected
// <property>"; adacache_kernels/_checks.py writes the full message for users.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../core/meter.h"
#include "../core/tokens.h"

namespace adacache::torch_checks {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t any_number = -1;  // of rows
constexpr int64_t max_videos = 65536;

inline void require(bool condition, const char* argument, const char* property) {
  if (!condition) throw std::invalid_argument(std::string(argument) + ": unexpected " + property);
}

inline bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

inline DType floating_dtype(const char* argument, const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  require(is_floating(dtype), argument, "dtype");
  return dtype == ScalarType::Float      ? DType::float32
         : dtype == ScalarType::BFloat16 ? DType::bfloat16
                                         : DType::float16;
}

inline void require_contiguous_channels(const char* argument, const Tensor& tensor) {
  require(tensor.size(2) <= 1 || tensor.stride(2) == 1, argument, "strides");
}

// The groups of a modulator [B, G, C] or [B, G, 1, C]; -1 for other shapes.
inline int64_t modulator_groups(const OptionalTensor& tensor) {
  if (!tensor) return -1;
  const bool fits = tensor->dim() == 3 || (tensor->dim() == 4 && tensor->size(2) == 1);
  return fits ? tensor->size(1) : -1;
}

inline TokenStrides token_strides(const Tensor& tensor) { return {tensor.stride(0), tensor.stride(1)}; }

// Whether two elements of the tensor share an address. Exact for views by slice, chunk, transpose and expand;
// conservative for other strides.
inline bool overlaps_itself(const Tensor& tensor) {
  std::array<std::pair<int64_t, int64_t>, 8> dimensions{};  // (stride, size), sorted
  size_t count = 0;
  if (tensor.dim() > static_cast<int64_t>(dimensions.size())) return true;
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    if (tensor.size(i) == 0) return false;
    if (tensor.size(i) <= 1) continue;
    const std::pair dimension{tensor.stride(i), tensor.size(i)};
    size_t at = count++;
    for (; at > 0 && dimension < dimensions[at - 1]; --at) dimensions[at] = dimensions[at - 1];
    dimensions[at] = dimension;
  }
  int64_t extent = 1;
  for (size_t i = 0; i < count; ++i) {
    const auto [stride, size] = dimensions[i];
    if (stride < extent) return true;
    extent = stride * (size - 1) + extent;
  }
  return false;
}

// Address range of a tensor, end exclusive.
struct AddressRange {
  uintptr_t begin = 0;
  uintptr_t end = 0;

  AddressRange() = default;
  explicit AddressRange(const Tensor& tensor) {
    const auto sizes = tensor.sizes();
    const auto strides = tensor.strides();
    int64_t last = 0;
    for (size_t i = 0; i < sizes.size(); ++i) {
      if (sizes[i] == 0) return;
      last += (sizes[i] - 1) * strides[i];
    }
    begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
    end = begin + (last + 1) * tensor.element_size();
  }
  bool meets(const AddressRange& other) const { return begin < other.end && other.begin < end; }
};

// Whether two tensors with overlapping address ranges share memory. Exact for views of one buffer with equal
// strides, such as the results of chunk(); otherwise true.
inline bool share_memory(const Tensor& a, const Tensor& b) {
  const int64_t bytes = static_cast<int64_t>(a.element_size());
  const int64_t distance_bytes = static_cast<int64_t>(reinterpret_cast<uintptr_t>(b.const_data_ptr()) -
                                                      reinterpret_cast<uintptr_t>(a.const_data_ptr()));
  const bool comparable = a.dim() == 3 && b.dim() == 3 && bytes == static_cast<int64_t>(b.element_size()) &&
                          a.stride(0) == b.stride(0) && a.stride(1) == b.stride(1) &&
                          distance_bytes % bytes == 0;
  if (!comparable) return true;
  // Elements coincide where distance = i * stride(0) + j * stride(1) + k, where i, j and k are differences
  // between an index of a and an index of b.
  struct Dimension {
    int64_t stride, size_of_a, size_of_b;

    bool allows(int64_t difference) const { return difference > -size_of_b && difference < size_of_a; }
    std::vector<int64_t> differences(int64_t rest) const {
      if (stride == 0 || (size_of_a == 1 && size_of_b == 1)) return {0};
      std::vector<int64_t> found;
      const int64_t floor = rest / stride - (rest % stride < 0 ? 1 : 0);
      for (const int64_t difference : {floor, floor + 1})
        if (allows(difference)) found.push_back(difference);
      return found;
    }
  };
  Dimension outer{a.stride(0), a.size(0), b.size(0)};
  Dimension inner{a.stride(1), a.size(1), b.size(1)};
  if (outer.stride < inner.stride) std::swap(outer, inner);
  const Dimension channels{1, a.size(2), b.size(2)};
  const int64_t distance = distance_bytes / bytes;
  for (const int64_t i : outer.differences(distance))
    for (const int64_t j : inner.differences(distance - i * outer.stride))
      if (channels.allows(distance - i * outer.stride - j * inner.stride)) return true;
  return false;
}

enum class Use { read, written };

// The outputs of an op: given by the caller, or allocated by the check of the op.
template <int count>
struct Outputs {
  std::array<OptionalTensor, count> tensors{};
  bool given = false;
  void (*prepare)(Tensor&) = nullptr;  // called for each allocated output
};

// Checks the arguments of one call against the lead tensor, which sets shape, dtype and device. memory() then
// checks that written tensors share no memory.
class Checks {
 public:
  Checks(const char* name, const Tensor& lead, Use use = Use::read) : lead_(lead) { record(name, lead, use); }

  // The lead must be [B, N, C].
  DType stream(const char* name) const {
    require(lead_.dim() == 3, name, "shape");
    require_contiguous_channels(name, lead_);
    return floating_dtype(name, lead_);
  }

  void device(const char* argument, const Tensor& tensor) const {
    require(tensor.is_cpu() == lead_.is_cpu() && tensor.is_cuda() == lead_.is_cuda() &&
                tensor.get_device_index() == lead_.get_device_index(),
            argument, "device");
  }

  void like(const char* argument, const Tensor& tensor, ScalarType dtype) const {
    device(argument, tensor);
    require(tensor.scalar_type() == dtype, argument, "dtype");
  }

  // The dtype of a tensor in that of the lead or in float32, on the device of the lead.
  DType like_or_float32(const char* argument, const Tensor& tensor) const {
    device(argument, tensor);
    const ScalarType dtype = tensor.scalar_type();
    require(dtype == lead_.scalar_type() || dtype == ScalarType::Float, argument, "dtype");
    return floating_dtype(argument, tensor);
  }

  // [rows, N, C] with N, C and the device of the lead.
  TokenStrides tokens(const char* argument, const Tensor& tensor, int64_t rows, Use use = Use::read,
                      const Tensor* may_be = nullptr) {
    require(tensor.dim() == 3 && (rows == any_number || tensor.size(0) == rows) &&
                tensor.size(1) == lead_.size(1) && tensor.size(2) == lead_.size(2),
            argument, "shape");
    device(argument, tensor);
    require_contiguous_channels(argument, tensor);
    record(argument, tensor, use, may_be);
    return token_strides(tensor);
  }
  TokenStrides tokens_and_dtype(const char* argument, const Tensor& tensor, int64_t rows, Use use = Use::read,
                                const Tensor* may_be = nullptr) {
    require(tensor.scalar_type() == lead_.scalar_type(), argument, "dtype");
    return tokens(argument, tensor, rows, use, may_be);
  }

  // Contiguous, with this dtype and the device of the lead.
  template <class T>
  const T* packed(const char* argument, const Tensor& tensor, ScalarType dtype) {
    like(argument, tensor, dtype);
    require(tensor.is_contiguous(), argument, "strides");
    record(argument, tensor, Use::read);
    return static_cast<const T*>(tensor.const_data_ptr());
  }

  // [size] with the dtype of the lead, or absent.
  const void* vector(const char* argument, const OptionalTensor& tensor, int64_t size) {
    if (!tensor) return nullptr;
    require(tensor->dim() == 1 && tensor->size(0) == size, argument, "shape");
    return packed<void>(argument, *tensor, lead_.scalar_type());
  }

  // The weight or bias of a norm.
  ChannelVector channel_vector(const char* argument, const OptionalTensor& tensor, int64_t channels) {
    if (!tensor) return {};
    require(tensor->dim() == 1 && tensor->size(0) == channels, argument, "shape");
    const DType dtype = like_or_float32(argument, *tensor);
    return {packed<void>(argument, *tensor, tensor->scalar_type()), dtype};
  }

  // table: [1, 1, C], added to the modulator, or absent.
  Modulator modulator(const char* argument, const OptionalTensor& tensor, const char* table_argument,
                      const OptionalTensor& table, const TokenShape& batch) {
    Modulator modulator = this->modulator(argument, tensor, batch);
    if (!table) return modulator;
    require(tensor.has_value(), table_argument, "value");
    require(
        table->dim() == 3 && table->size(0) == 1 && table->size(1) == 1 && table->size(2) == batch.channels,
        table_argument, "shape");
    like(table_argument, *table, ScalarType::Float);
    require_contiguous_channels(table_argument, *table);
    record(table_argument, *table, Use::read);
    modulator.table = static_cast<const float*>(table->const_data_ptr());
    return modulator;
  }

  Modulator modulator(const char* argument, const OptionalTensor& tensor, const TokenShape& batch) {
    if (!tensor) return {};
    const int64_t tokens = batch.frames * batch.places;
    const int64_t groups = modulator_groups(tensor);
    const int64_t last = tensor->dim() - 1;
    require(groups >= 0 && tensor->size(0) == batch.rows && tensor->size(last) == batch.channels &&
                (groups == 1 || groups == batch.frames || groups == tokens),
            argument, "shape");
    const DType dtype = like_or_float32(argument, *tensor);
    require(tensor->size(last) <= 1 || tensor->stride(last) == 1, argument, "strides");
    record(argument, *tensor, Use::read);
    const int64_t stride = tensor->stride(1);
    const void* data = tensor->const_data_ptr();
    if (groups == 1) return {data, tensor->stride(0), 0, 0, dtype, nullptr};
    if (groups == batch.frames) return {data, tensor->stride(0), stride, 0, dtype, nullptr};
    return {data, tensor->stride(0), stride * batch.places, stride, dtype, nullptr};
  }

  // int32 [rows]. Values are checked on the CPU only: on CUDA that would synchronize.
  const int32_t* indices(const char* argument, const Tensor& tensor, int64_t rows, int64_t end) {
    require(tensor.dim() == 1 && (rows == any_number || tensor.size(0) == rows), argument, "shape");
    const auto* values = packed<int32_t>(argument, tensor, ScalarType::Int);
    if (tensor.is_cpu())
      for (int64_t i = 0; i < tensor.size(0); ++i)
        require(values[i] >= 0 && values[i] < end, argument, "value");
    return values;
  }

  // Row indices of the batch in a tensor of `total` rows; distinct if the rows are written.
  RowIndex index(const char* argument, const OptionalTensor& tensor, int64_t rows, int64_t total, Use use) {
    if (!tensor) return {nullptr, total};
    const int32_t* values = indices(argument, *tensor, rows, total);
    if (tensor->is_cpu() && use == Use::written) {
      std::vector<int32_t> sorted(values, values + tensor->size(0));
      std::sort(sorted.begin(), sorted.end());
      require(std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end(), argument, "value");
    }
    return {values, total};
  }

  const int32_t* video_of_row(const OptionalTensor& tensor, int64_t rows, int64_t videos) {
    require(videos >= 1 && videos <= max_videos, "num_videos", "value");
    require(tensor || videos == 1, "video_of_row", "value");
    return tensor ? indices("video_of_row", *tensor, rows, videos) : nullptr;
  }

  // A kept residual, in the dtype of the lead or float8; if it is only read, in any floating dtype.
  Cache cache(const Tensor& residual, const OptionalTensor& scale, const char* rows_name,
              const OptionalTensor& rows, Use use, int64_t batch) {
    Cache c{};
    c.strides = tokens("residual", residual, rows ? any_number : batch, use);
    const bool float8 = residual.scalar_type() == ScalarType::Float8_e4m3fn;
    require(float8 || use == Use::read || residual.scalar_type() == lead_.scalar_type(), "residual", "dtype");
    c.dtype = float8 ? DType::float8_e4m3 : floating_dtype("residual", residual);
    c.rows = index(rows_name, rows, batch, residual.size(0), use);
    c.data = use == Use::written ? residual.mutable_data_ptr() : const_cast<void*>(residual.const_data_ptr());
    require(scale.has_value() == float8, "residual_scale", "value");
    if (!scale) return c;
    require(scale->dim() == 2 && scale->size(0) == residual.size(0) && scale->size(1) == residual.size(1),
            "residual_scale", "shape");
    like("residual_scale", *scale, ScalarType::Float);
    record("residual_scale", *scale, use);
    c.scale_strides = token_strides(*scale);
    c.scale = static_cast<float*>(use == Use::written ? scale->mutable_data_ptr()
                                                      : const_cast<void*>(scale->const_data_ptr()));
    return c;
  }

  // Checks or allocates output `number`, [rows, N, C] like the lead, and stores it in the parameters p.
  template <int count, class Parameters>
  void output(Parameters& p, Outputs<count>& outputs, int number, int64_t rows,
              const OptionalTensor& x_rows) {
    OptionalTensor& tensor = outputs.tensors[number];
    if (outputs.given) {
      const Tensor* may_be = number == 0 && !x_rows ? &lead_ : nullptr;
      tokens_and_dtype(number == 0 ? "out" : "norm_out", *tensor, rows, Use::written, may_be);
    } else if (number == 0 && !x_rows) {
      tensor = torch::stable::empty_like(lead_);
    } else {
      const std::array<int64_t, 3> size{rows, lead_.size(1), lead_.size(2)};
      tensor = torch::stable::new_empty(lead_, {size.data(), size.size()});
    }
    if (!outputs.given && outputs.prepare) outputs.prepare(*tensor);
    p.out = tensor->mutable_data_ptr();
    p.out_strides = token_strides(*tensor);
  }

  // Checks or allocates the outputs `number` and `number` + 1 of a norm in float8: the values [rows, N, C]
  // and their scales [rows, N, 1].
  template <int count>
  void float8_output(Norm& norm, Outputs<count>& outputs, int number, int64_t rows) {
    OptionalTensor& values = outputs.tensors[number];
    OptionalTensor& scale = outputs.tensors[number + 1];
    if (outputs.given) {
      require(values->scalar_type() == ScalarType::Float8_e4m3fn, "norm_out", "dtype");
      tokens("norm_out", *values, rows, Use::written);
      require(scale->dim() == 3 && scale->size(0) == rows && scale->size(1) == lead_.size(1) &&
                  scale->size(2) == 1,
              "norm_scale", "shape");
      like("norm_scale", *scale, ScalarType::Float);
      record("norm_scale", *scale, Use::written);
    } else {
      const std::array<int64_t, 3> size{rows, lead_.size(1), lead_.size(2)};
      const std::array<int64_t, 3> scale_size{rows, lead_.size(1), 1};
      values = torch::stable::new_empty(lead_, {size.data(), size.size()}, ScalarType::Float8_e4m3fn);
      scale = torch::stable::new_empty(lead_, {scale_size.data(), scale_size.size()}, ScalarType::Float);
      if (outputs.prepare) outputs.prepare(*values);
    }
    norm.out = values->mutable_data_ptr();
    norm.out_strides = token_strides(*values);
    norm.out_scale = static_cast<float*>(scale->mutable_data_ptr());
    norm.out_scale_strides = token_strides(*scale);
  }

  // may_be: the input that a written tensor may alias, with equal data pointer and strides.
  void record(const char* name, const Tensor& tensor, Use use, const Tensor* may_be = nullptr) {
    if (count_ == arguments_.size()) throw std::logic_error("more tensors than an op has");
    arguments_[count_++] = {name, &tensor, may_be, use};
  }

  // Written tensors must not overlap themselves or any other tensor.
  void memory() const {
    std::array<AddressRange, max_tensors> ranges;
    for (size_t i = 0; i < count_; ++i) ranges[i] = AddressRange(*arguments_[i].tensor);
    for (size_t i = 0; i < count_; ++i) {
      const Argument& written = arguments_[i];
      if (written.use == Use::read) continue;
      require(!overlaps_itself(*written.tensor), written.name, "strides");
      for (size_t j = 0; j < count_; ++j) {
        const Argument& other = arguments_[j];
        if (i == j || !ranges[i].meets(ranges[j])) continue;
        const bool replaces = written.may_be == other.tensor &&
                              written.tensor->const_data_ptr() == other.tensor->const_data_ptr() &&
                              written.tensor->stride(0) == other.tensor->stride(0) &&
                              written.tensor->stride(1) == other.tensor->stride(1);
        require(replaces || !share_memory(*written.tensor, *other.tensor), written.name, "memory");
      }
    }
  }

 private:
  struct Argument {
    const char* name;
    const Tensor* tensor;
    const Tensor* may_be;
    Use use;
  };
  static constexpr size_t max_tensors = 20;

  const Tensor& lead_;
  std::array<Argument, max_tensors> arguments_{};
  size_t count_ = 0;
};

inline MotionStrides motion_strides(const std::vector<int64_t>& strides, int64_t frames) {
  require(strides.size() <= max_motion_strides, "strides", "value");
  MotionStrides motion{};
  for (const int64_t stride : strides) {
    require(stride >= 1 && stride < frames, "strides", "value");
    motion.stride[motion.count++] = static_cast<int>(stride);
  }
  return motion;
}

inline Metric checked_metric(int64_t metric) {
  require(metric >= 0 && metric <= 2, "metric", "value");
  return static_cast<Metric>(metric);
}

inline Rounding checked_rounding(int64_t rounding) {
  require(rounding >= 0 && rounding <= 1, "rounding", "value");
  return static_cast<Rounding>(rounding);
}

inline NormKind checked_norm(int64_t norm) {
  require(norm >= 0 && norm <= 1, "norm", "value");
  return static_cast<NormKind>(norm);
}

inline float checked_eps(double eps) {
  require(eps >= 0, "eps", "value");
  return static_cast<float>(eps);
}

}  // namespace adacache::torch_checks

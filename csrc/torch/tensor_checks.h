// What the ops ask of single tensors: dtype, device, shape, strides, memory of their own. Only the stable ABI
// of LibTorch is used: no ATen, no c10, no Python.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../core/tokens.h"

namespace adacache::torch_checks {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

// What messages say of tensors, put into words only where a message is wanted: checks run on every call.
template <class Values>
struct List {
  Values values;

  friend std::ostream& operator<<(std::ostream& stream, const List& list) {
    stream << '[';
    for (size_t i = 0; i < list.values.size(); ++i) stream << (i ? ", " : "") << list.values[i];
    return stream << ']';
  }
};

template <class Values>
List<Values> list(const Values& values) {
  return {values};
}

inline auto shape(const Tensor& tensor) { return list(tensor.sizes()); }

inline auto strides(const Tensor& tensor) { return list(tensor.strides()); }

struct DeviceOf {
  const Tensor& tensor;

  friend std::ostream& operator<<(std::ostream& stream, const DeviceOf& device) {
    if (device.tensor.is_cpu()) return stream << "cpu";
    if (device.tensor.is_cuda()) return stream << "cuda:" << device.tensor.get_device_index();
    return stream << "another kind of device";
  }
};

// A number of rows that is asked for; any_number: none is.
constexpr int64_t any_number = -1;

struct Rows {
  int64_t rows;

  friend std::ostream& operator<<(std::ostream& stream, const Rows& wanted) {
    return wanted.rows == any_number ? stream << "any number" : stream << wanted.rows;
  }
};

inline const char* name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
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

inline void require_device(const char* argument, const Tensor& tensor, const char* like,
                           const Tensor& other) {
  const bool same = tensor.is_cpu() == other.is_cpu() && tensor.is_cuda() == other.is_cuda() &&
                    tensor.get_device_index() == other.get_device_index();
  require(same, argument, ": expected a tensor on ", DeviceOf{other}, " like ", like, ", got one on ",
          DeviceOf{tensor});
}

inline void require_dtype(const char* argument, const Tensor& tensor, ScalarType dtype) {
  require(tensor.scalar_type() == dtype, argument, ": expected ", name(dtype), ", got ",
          name(tensor.scalar_type()));
}

inline void require_dtype_like(const char* argument, const Tensor& tensor, const char* like,
                               const Tensor& other) {
  require(tensor.scalar_type() == other.scalar_type(), argument, ": expected ", name(other.scalar_type()),
          " like ", like, ", got ", name(tensor.scalar_type()));
}

inline DType floating_dtype(const char* argument, const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  require(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, argument,
          ": expected float32, bfloat16 or float16, got ", name(dtype));
  return dtype == ScalarType::Float      ? DType::float32
         : dtype == ScalarType::BFloat16 ? DType::bfloat16
                                         : DType::float16;
}

inline void require_contiguous(const char* argument, const Tensor& tensor) {
  require(tensor.is_contiguous(), argument, ": expected a contiguous tensor, got strides ", strides(tensor));
}

inline void require_contiguous_channels(const char* argument, const Tensor& tensor) {
  require(tensor.size(2) <= 1 || tensor.stride(2) == 1, argument,
          ": expected channels contiguous in memory (stride 1 in the last dimension), got strides ",
          strides(tensor));
}

inline TokenStrides token_strides(const Tensor& tensor) { return {tensor.stride(0), tensor.stride(1)}; }

// The tensor that the others of a call must resemble.
struct Reference {
  const char* name;
  const Tensor& tensor;
};

// [rows, N, C] on the device of `like`, with its N and C.
inline TokenStrides tokens_like(const char* argument, const Tensor& tensor, const Reference& like,
                                int64_t rows) {
  const int64_t tokens = like.tensor.size(1);
  const int64_t channels = like.tensor.size(2);
  const bool fits = tensor.dim() == 3 && (rows == any_number || tensor.size(0) == rows) &&
                    tensor.size(1) == tokens && tensor.size(2) == channels;
  require(fits, argument, ": expected [", rows == any_number ? "rows" : "B", ", N, C] = [", Rows{rows}, ", ",
          tokens, ", ", channels, "] like ", like.name, ", got ", shape(tensor));
  require_device(argument, tensor, like.name, like.tensor);
  require_contiguous_channels(argument, tensor);
  return token_strides(tensor);
}

// The same, and of the dtype of `like`.
inline TokenStrides tokens_and_dtype_like(const char* argument, const Tensor& tensor, const Reference& like,
                                          int64_t rows) {
  const TokenStrides strides = tokens_like(argument, tensor, like, rows);
  require_dtype_like(argument, tensor, like.name, like.tensor);
  return strides;
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

// An argument by its name; null where it is absent.
struct Named {
  const char* name;
  const Tensor* tensor;

  Named(const char* name, const Tensor* tensor) : name(name), tensor(tensor) {}
  Named(const char* name, const Tensor& tensor) : name(name), tensor(&tensor) {}
  Named(const char* name, const OptionalTensor& tensor) : name(name), tensor(tensor ? &*tensor : nullptr) {}
};

// What an op writes. Only an output that takes the place of an input may be that very input.
struct Written : Named {
  template <class T>
  Written(const char* name, const T& tensor, const Tensor* may_be = nullptr)
      : Named(name, tensor), may_be(may_be) {}
  const Tensor* may_be;
};

// Addresses from the first to past the last element.
struct AddressRange {
  uintptr_t begin = 0;
  uintptr_t end = 0;

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

// Whether two tensors whose address ranges cross share memory. Views of one buffer with equal strides, such
// as the halves that chunk() gives, are told apart; other views are taken to share.
inline bool share_memory(const Tensor& a, const Tensor& b) {
  const int64_t bytes = static_cast<int64_t>(a.element_size());
  const int64_t distance_bytes = static_cast<int64_t>(reinterpret_cast<uintptr_t>(b.const_data_ptr()) -
                                                      reinterpret_cast<uintptr_t>(a.const_data_ptr()));
  const bool comparable = a.dim() == 3 && b.dim() == 3 && bytes == static_cast<int64_t>(b.element_size()) &&
                          a.stride(0) == b.stride(0) && a.stride(1) == b.stride(1) &&
                          distance_bytes % bytes == 0;
  if (!comparable) return true;
  // They meet where distance = i * stride(0) + j * stride(1) + k, with i, j and k an index of a less one of
  // b.
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

inline bool same_view(const Tensor& a, const Tensor& b) {
  return a.const_data_ptr() == b.const_data_ptr() && a.stride(0) == b.stride(0) && a.stride(1) == b.stride(1);
}

// What an op writes has an address for each element, and shares none with what else it writes or reads.
inline void require_own_memory(std::initializer_list<Written> written, std::initializer_list<Named> read) {
  std::vector<std::pair<Named, AddressRange>> others;
  others.reserve(written.size() + read.size());
  for (const Named& input : read)
    if (input.tensor) others.emplace_back(input, AddressRange(*input.tensor));
  for (const Written& output : written) {
    if (!output.tensor) continue;
    require(!overlaps_itself(*output.tensor), output.name,
            ": is written and so needs an address of its own for each element, got strides ",
            strides(*output.tensor), " for ", shape(*output.tensor));
    const AddressRange range(*output.tensor);
    for (const auto& [other, other_range] : others) {
      if (!range.meets(other_range)) continue;
      const bool replaced = other.tensor == output.may_be;
      require(!share_memory(*output.tensor, *other.tensor) ||
                  (replaced && same_view(*output.tensor, *other.tensor)),
              output.name, ": expected ", replaced ? other.name : "", replaced ? " itself or " : "",
              "memory of its own, but it overlaps ", other.name);
    }
    others.emplace_back(output, range);
  }
}

// int32 [rows], contiguous.
inline const int32_t* checked_indices(const char* argument, const Tensor& indices, int64_t rows,
                                      const Reference& like) {
  require(indices.dim() == 1 && (rows == any_number || indices.size(0) == rows), argument,
          ": expected [B] = [", Rows{rows}, "], got ", shape(indices));
  require_dtype(argument, indices, ScalarType::Int);
  require_device(argument, indices, like.name, like.tensor);
  require_contiguous(argument, indices);
  return static_cast<const int32_t*>(indices.const_data_ptr());
}

}  // namespace adacache::torch_checks

// The arguments of the attention ops, checked: from tensors to the parameters of the kernels.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <array>

#include "../core/fused_qk_norm_rope.h"
#include "../core/temporal_attention.h"
#include "tensor_checks.h"

namespace adacache::torch_checks {

// The arguments that both ops share.
struct NormRopeArguments {
  const OptionalTensor& q_weight;
  const OptionalTensor& k_weight;
  const OptionalTensor& cos;
  const OptionalTensor& sin;
  bool interleaved;
  double eps;
};

inline HeadShape head_shape(const Tensor& qkv) {
  require(qkv.dim() == 5 && qkv.size(2) == 3, "qkv: expected [B, N, 3, heads, dim], got ", shape(qkv));
  floating_dtype("qkv", qkv);
  const int64_t heads = qkv.size(3), dim = qkv.size(4);
  require(dim <= max_head_dim, "qkv: expected dim of at most ", max_head_dim, ", got ", dim);
  const std::array<int64_t, 3> wanted{heads * dim, dim, 1};
  for (int i = 0; i < 3; ++i)
    require(qkv.numel() == 0 || qkv.size(2 + i) <= 1 || qkv.stride(2 + i) == wanted[i],
            "qkv: expected the last three dimensions contiguous (strides ", list(wanted), "), got strides ",
            list(qkv.strides()));
  return {heads, dim};
}

// frames: the angles have as many rows, or one for each token; any_number: any divisor of the tokens.
inline NormRope norm_rope(const Tensor& qkv, const NormRopeArguments& arguments, int64_t frames) {
  const Reference like{"qkv", qkv};
  const int64_t tokens = qkv.size(1), dim = qkv.size(4);
  NormRope p{};
  const auto weight = [&](const Named& argument, const Named& other) -> const void* {
    if (!argument.tensor) {
      require(!other.tensor, argument.name, ": expected a tensor with ", other.name, ", got None");
      return nullptr;
    }
    const Tensor& tensor = *argument.tensor;
    require(tensor.dim() == 1 && tensor.size(0) == dim, argument.name, ": expected [dim] = [", dim, "], got ",
            shape(tensor));
    require_device(argument.name, tensor, like.name, qkv);
    require_dtype_like(argument.name, tensor, like.name, qkv);
    require_contiguous(argument.name, tensor);
    return tensor.const_data_ptr();
  };
  const auto angles = [&](const Named& argument, const Named& other) -> const float* {
    if (!argument.tensor) {
      require(!other.tensor, argument.name, ": expected a tensor with ", other.name, ", got None");
      return nullptr;
    }
    const Tensor& tensor = *argument.tensor;
    require(dim % 2 == 0, "qkv: expected an even dim with ", argument.name, ", got ", dim);
    const int64_t length = tensor.dim() == 2 ? tensor.size(0) : 0;
    const bool by_group = frames == any_number ? length > 0 && tokens % length == 0 : length == frames;
    require(tensor.dim() == 2 && tensor.size(1) == dim / 2 && (by_group || length == tokens), argument.name,
            ": expected [T|N, dim / 2] = [",
            frames == any_number ? "divisor of " + std::to_string(tokens) : std::to_string(frames), "|",
            tokens, ", ", dim / 2, "], got ", shape(tensor));
    require(!other.tensor || other.tensor->dim() != 2 || other.tensor->size(0) == length, argument.name,
            ": expected as many rows as ", other.name, ", got ", shape(tensor));
    require_device(argument.name, tensor, like.name, qkv);
    require_dtype(argument.name, tensor, ScalarType::Float);
    require_contiguous(argument.name, tensor);
    p.tokens_per_angle = length > 0 ? tokens / length : 1;
    return static_cast<const float*>(tensor.const_data_ptr());
  };
  const Named q_weight{"q_weight", arguments.q_weight}, k_weight{"k_weight", arguments.k_weight};
  const Named cos{"cos", arguments.cos}, sin{"sin", arguments.sin};
  p.q_weight = weight(q_weight, k_weight);
  p.k_weight = weight(k_weight, q_weight);
  p.cos = angles(cos, sin);
  p.sin = angles(sin, cos);
  p.interleaved = arguments.interleaved;
  require(arguments.eps >= 0, "eps: expected at least 0, got ", arguments.eps);
  p.eps = static_cast<float>(arguments.eps);
  return p;
}

inline FusedQkNormRope fused_qk_norm_rope(const Tensor& qkv, const NormRopeArguments& arguments) {
  FusedQkNormRope p{};
  p.shape = head_shape(qkv);
  p.dtype = floating_dtype("qkv", qkv);
  p.rows = qkv.size(0);
  p.tokens = qkv.size(1);
  p.strides = token_strides(qkv);
  p.norm_rope = norm_rope(qkv, arguments, any_number);
  require_own_memory({{"qkv", qkv}}, {{"q_weight", arguments.q_weight},
                                      {"k_weight", arguments.k_weight},
                                      {"cos", arguments.cos},
                                      {"sin", arguments.sin}});
  p.qkv = qkv.mutable_data_ptr();
  return p;
}

inline TemporalAttention temporal_attention(const Tensor& qkv, const NormRopeArguments& arguments,
                                            int64_t frames, double scale, const Tensor* out) {
  TemporalAttention p{};
  p.shape = head_shape(qkv);
  p.dtype = floating_dtype("qkv", qkv);
  const int64_t tokens = qkv.size(1), channels = p.shape.heads * p.shape.dim;
  require(frames >= 1 && frames <= max_attention_frames, "frames: expected 1 to ", max_attention_frames,
          ", got ", frames);
  require(tokens % frames == 0, "frames: expected a divisor of the number of tokens N = ", tokens, ", got ",
          frames);
  p.rows = qkv.size(0);
  p.frames = frames;
  p.places = tokens / frames;
  p.qkv = qkv.const_data_ptr();
  p.qkv_strides = token_strides(qkv);
  p.norm_rope = norm_rope(qkv, arguments, frames);
  p.scale = static_cast<float>(scale);
  if (out) {
    require(out->dim() == 3 && out->size(0) == p.rows && out->size(1) == tokens && out->size(2) == channels,
            "out: expected [B, N, heads * dim] = [", p.rows, ", ", tokens, ", ", channels, "], got ",
            shape(*out));
    require_device("out", *out, "qkv", qkv);
    require_dtype_like("out", *out, "qkv", qkv);
    require_contiguous_channels("out", *out);
    require_own_memory({{"out", out}}, {{"qkv", qkv},
                                        {"q_weight", arguments.q_weight},
                                        {"k_weight", arguments.k_weight},
                                        {"cos", arguments.cos},
                                        {"sin", arguments.sin}});
    p.out = out->mutable_data_ptr();
    p.out_strides = token_strides(*out);
  }
  return p;
}

// An output that temporal_attention allocates itself.
inline Tensor new_attention_out(const Tensor& qkv) {
  const std::array<int64_t, 3> size{qkv.size(0), qkv.size(1), qkv.size(3) * qkv.size(4)};
  return torch::stable::new_empty(qkv, {size.data(), size.size()});
}

}  // namespace adacache::torch_checks

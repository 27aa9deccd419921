// SPDX-License-Identifier: Apache-2.0
// Registers ops for any backend. The allocating variant and the out= variant of an op are derived from the
// signature of its check.
#pragma once

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <type_traits>

#include "op_checks.h"

namespace adacache::torch_ops {

using torch::stable::Tensor;
using torch_checks::Metered;
using torch_checks::Outputs;

template <class Parameters>
constexpr bool is_metered = false;
template <class Parameters>
constexpr bool is_metered<Metered<Parameters>> = true;

// A Backend has
//   prepare: null, or a function that is called for each allocated output
//   run(kernel, parameters, like): runs on the device of `like`
//   meter(kernel, metered, sums): runs and writes the sums
template <class Backend, auto kernel, auto check, class Check = decltype(check)>
struct Op;

template <class Backend, auto kernel, auto check, class Parameters, int count, class... Arguments>
struct Op<Backend, kernel, check, Parameters (*)(Outputs<count>&, Arguments...)> {
  // Returns the allocated outputs, and the sums of a meter.
  static auto fresh(std::decay_t<Arguments>... arguments) {
    Outputs<count> outputs{.prepare = Backend::prepare};
    const Parameters p = check(outputs, arguments...);
    const auto sums = run(p, arguments...);
    const auto allocated = std::apply(
        [](const auto&... tensor) { return std::tuple_cat(as_tuple(tensor)...); }, outputs.tensors);
    return unwrapped(std::tuple_cat(allocated, sums));
  }

  static auto into(std::decay_t<Arguments>... arguments, Tensor out)
    requires(count == 1)
  {
    Outputs<count> outputs{{out}, true};
    return unwrapped(run(check(outputs, arguments...), arguments...));
  }
  static auto into_both(std::decay_t<Arguments>... arguments, Tensor first, Tensor second)
    requires(count == 2)
  {
    Outputs<count> outputs{{first, second}, true};
    return unwrapped(run(check(outputs, arguments...), arguments...));
  }
  static auto into_three(std::decay_t<Arguments>... arguments, Tensor first, Tensor second, Tensor third)
    requires(count == 3)
  {
    Outputs<count> outputs{{first, second, third}, true};
    return unwrapped(run(check(outputs, arguments...), arguments...));
  }
  // For stack_residual_meter, whose output is optional.
  static auto without_output(std::decay_t<Arguments>... arguments) {
    Outputs<count> outputs{};
    return unwrapped(run(check(outputs, arguments...), arguments...));
  }

 private:
  static std::tuple<Tensor> as_tuple(const std::optional<Tensor>& tensor) { return {*tensor}; }

  // Returns the sums of a meter, otherwise an empty tuple.
  template <class... Rest>
  static auto run(const Parameters& p, const Tensor& like, const Rest&...) {
    if constexpr (is_metered<Parameters>) {
      const std::array<int64_t, 2> size{p.num_videos, p.sum_columns};
      Tensor sums =
          torch::stable::new_empty(like, {size.data(), size.size()}, torch::headeronly::ScalarType::Double);
      Backend::meter(kernel, p, sums);
      return std::tuple<Tensor>{sums};
    } else {
      Backend::run(kernel, p, like);
      return std::tuple<>{};
    }
  }

  static void unwrapped(const std::tuple<>&) {}
  static Tensor unwrapped(const std::tuple<Tensor>& result) { return std::get<0>(result); }
  template <class... Results>
  static std::tuple<Results...> unwrapped(const std::tuple<Results...>& results) {
    return results;
  }
};

}  // namespace adacache::torch_ops

#define ADACACHE_IMPL(variant, schema, name) \
  library.impl(                              \
      schema,                                \
      TORCH_BOX(                             \
          (&adacache::torch_ops::Op<Backend, &kernels::name, &adacache::torch_checks::name>::variant)))
#define ADACACHE_OP(name) ADACACHE_IMPL(fresh, #name, name)
#define ADACACHE_OP_WITH_OUT(name) \
  ADACACHE_OP(name);               \
  ADACACHE_IMPL(into, #name "_out", name)
#define ADACACHE_OP_WITH_TWO_OUTS(name) \
  ADACACHE_OP(name);                    \
  ADACACHE_IMPL(into_both, #name "_out", name)
#define ADACACHE_OP_WITH_THREE_OUTS(name) \
  ADACACHE_OP(name);                      \
  ADACACHE_IMPL(into_three, #name "_out", name)

// The ops of every backend. The including file defines `Backend` and the namespace `kernels`.
#define ADACACHE_COMMON_OPS                                                    \
  ADACACHE_OP_WITH_OUT(gated_residual);                                        \
  ADACACHE_OP_WITH_OUT(gated_residual_meter);                                  \
  ADACACHE_IMPL(without_output, "stack_residual_meter", stack_residual_meter); \
  ADACACHE_IMPL(into, "stack_residual_meter_out", stack_residual_meter);       \
  ADACACHE_OP(residual_meter);                                                 \
  ADACACHE_OP_WITH_OUT(reuse_residual);                                        \
  ADACACHE_OP_WITH_OUT(extrapolate_residual);                                  \
  ADACACHE_OP_WITH_OUT(extrapolate_residual_meter);                            \
  ADACACHE_OP_WITH_OUT(layer_norm_modulate);                                   \
  ADACACHE_OP_WITH_OUT(rms_norm_modulate);                                     \
  ADACACHE_OP_WITH_TWO_OUTS(norm_modulate_float8);                             \
  ADACACHE_OP_WITH_TWO_OUTS(gated_residual_norm);                              \
  ADACACHE_OP_WITH_THREE_OUTS(gated_residual_norm_float8);                     \
  ADACACHE_OP_WITH_TWO_OUTS(gated_residual_norm_meter);                        \
  ADACACHE_OP(decide)

// The CUDA implementations of the ops, whose schemas the CPU library defines.
#ifndef USE_CUDA
#define USE_CUDA  // The stable headers declare the CUDA part of the ABI only then.
#endif
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <tuple>

#include "../cuda/ops.h"
#include "checks.h"

namespace adacache::cuda_ops {
namespace {

using torch::stable::Tensor;
using torch_checks::Metered;
using torch_checks::new_contiguous_out;
using torch_checks::new_out;
using torch_checks::OptionalTensor;
using torch_checks::set_out;
using Integers = std::vector<int64_t>;
using Tensors = std::vector<Tensor>;

// The device of a tensor made current, and the stream that PyTorch uses there now.
struct Target {
  explicit Target(const Tensor& tensor) : guard(tensor.get_device_index()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
};

template <class Parameters>
void run(cudaError_t (*op)(const Parameters&, cudaStream_t), const Parameters& p, const Tensor& x) {
  const Target target(x);
  STD_CUDA_CHECK(op(p, target.stream));
}

template <class Parameters>
Tensor run_meter(cudaError_t (*op)(const Parameters&, const cuda::MeterSums&, cudaStream_t),
                 const Metered<Parameters>& m, const MotionStrides& motion, const Tensor& like) {
  const Target target(like);
  Tensor sums = torch_checks::new_sums(like, m.num_videos, motion);
  const int64_t elements = cuda::workspace_elements(m.parameters);
  Tensor workspace = torch::stable::new_empty(like, {&elements, 1}, torch::headeronly::ScalarType::Double);
  STD_CUDA_CHECK(op(m.parameters,
                    {m.video_of_row, m.num_videos, static_cast<double*>(sums.mutable_data_ptr()),
                     static_cast<double*>(workspace.mutable_data_ptr())},
                    target.stream));
  return sums;
}

Tensor gated_residual(Tensor x, Tensor y, OptionalTensor gate, OptionalTensor x_rows) {
  GatedResidual p = torch_checks::gated_residual(x, y, gate, x_rows, nullptr);
  Tensor out = new_out(x, x_rows);
  set_out(p, out);
  run(cuda::gated_residual, p, x);
  return out;
}

void gated_residual_out(Tensor x, Tensor y, OptionalTensor gate, OptionalTensor x_rows, Tensor out) {
  run(cuda::gated_residual, torch_checks::gated_residual(x, y, gate, x_rows, &out), x);
}

std::tuple<Tensor, Tensor> gated_residual_meter(Tensor x, Tensor y, OptionalTensor gate, Tensor residual,
                                                OptionalTensor residual_scale, OptionalTensor x_rows,
                                                OptionalTensor residual_rows, OptionalTensor video_of_row,
                                                int64_t num_videos, int64_t frames, Integers strides,
                                                int64_t metric) {
  auto m = torch_checks::gated_residual_meter(x, y, gate, residual, residual_scale, x_rows, residual_rows,
                                              {video_of_row, num_videos, frames, strides, metric}, nullptr);
  Tensor out = new_out(x, x_rows);
  set_out(m.parameters, out);
  return {out, run_meter(cuda::gated_residual_meter, m, m.parameters.motion, x)};
}

Tensor gated_residual_meter_out(Tensor x, Tensor y, OptionalTensor gate, Tensor residual,
                                OptionalTensor residual_scale, OptionalTensor x_rows,
                                OptionalTensor residual_rows, OptionalTensor video_of_row, int64_t num_videos,
                                int64_t frames, Integers strides, int64_t metric, Tensor out) {
  const auto m =
      torch_checks::gated_residual_meter(x, y, gate, residual, residual_scale, x_rows, residual_rows,
                                         {video_of_row, num_videos, frames, strides, metric}, &out);
  return run_meter(cuda::gated_residual_meter, m, m.parameters.motion, x);
}

Tensor stack_residual_meter(Tensor x_out, Tensor x_in, Tensor residual, OptionalTensor residual_scale,
                            OptionalTensor rows, OptionalTensor video_of_row, int64_t num_videos,
                            int64_t frames, Integers strides, int64_t metric) {
  const auto m =
      torch_checks::stack_residual_meter(x_out, x_in, residual, residual_scale, rows,
                                         {video_of_row, num_videos, frames, strides, metric}, nullptr);
  return run_meter(cuda::stack_residual_meter, m, m.parameters.motion, x_out);
}

Tensor stack_residual_meter_out(Tensor x_out, Tensor x_in, Tensor residual, OptionalTensor residual_scale,
                                OptionalTensor rows, OptionalTensor video_of_row, int64_t num_videos,
                                int64_t frames, Integers strides, int64_t metric, Tensor out) {
  const auto m = torch_checks::stack_residual_meter(
      x_out, x_in, residual, residual_scale, rows, {video_of_row, num_videos, frames, strides, metric}, &out);
  return run_meter(cuda::stack_residual_meter, m, m.parameters.motion, x_out);
}

Tensor residual_meter(Tensor residual, Tensor old, OptionalTensor video_of_row, int64_t num_videos,
                      int64_t frames, Integers strides, int64_t metric) {
  const auto m =
      torch_checks::residual_meter(residual, old, {video_of_row, num_videos, frames, strides, metric});
  return run_meter(cuda::residual_meter, m, m.parameters.motion, residual);
}

Tensor reuse_residual(Tensor x, Tensor residual, OptionalTensor residual_scale, OptionalTensor x_rows,
                      OptionalTensor residual_rows, OptionalTensor video_of_row, OptionalTensor reuse) {
  ReuseResidual p = torch_checks::reuse_residual(x, residual, residual_scale, x_rows, residual_rows,
                                                 video_of_row, reuse, nullptr);
  Tensor out = new_out(x, x_rows);
  set_out(p, out);
  run(cuda::reuse_residual, p, x);
  return out;
}

void reuse_residual_out(Tensor x, Tensor residual, OptionalTensor residual_scale, OptionalTensor x_rows,
                        OptionalTensor residual_rows, OptionalTensor video_of_row, OptionalTensor reuse,
                        Tensor out) {
  run(cuda::reuse_residual,
      torch_checks::reuse_residual(x, residual, residual_scale, x_rows, residual_rows, video_of_row, reuse,
                                   &out),
      x);
}

Tensor extrapolate_residual(Tensor x, Tensors factors, Tensor coefficients, OptionalTensor x_rows,
                            OptionalTensor residual_rows, OptionalTensor video_of_row) {
  ExtrapolateResidual p = torch_checks::extrapolate_residual(x, factors, coefficients, x_rows, residual_rows,
                                                             video_of_row, nullptr);
  Tensor out = new_out(x, x_rows);
  set_out(p, out);
  run(cuda::extrapolate_residual, p, x);
  return out;
}

void extrapolate_residual_out(Tensor x, Tensors factors, Tensor coefficients, OptionalTensor x_rows,
                              OptionalTensor residual_rows, OptionalTensor video_of_row, Tensor out) {
  run(cuda::extrapolate_residual,
      torch_checks::extrapolate_residual(x, factors, coefficients, x_rows, residual_rows, video_of_row, &out),
      x);
}

Tensor layer_norm_modulate(Tensor x, OptionalTensor shift, OptionalTensor scale, OptionalTensor weight,
                           OptionalTensor bias, double eps, OptionalTensor x_rows) {
  LayerNormModulate p =
      torch_checks::layer_norm_modulate(x, {shift, scale, weight, bias, eps}, x_rows, nullptr);
  Tensor out = new_out(x, x_rows);
  set_out(p.norm, out);
  run(cuda::layer_norm_modulate, p, x);
  return out;
}

void layer_norm_modulate_out(Tensor x, OptionalTensor shift, OptionalTensor scale, OptionalTensor weight,
                             OptionalTensor bias, double eps, OptionalTensor x_rows, Tensor out) {
  run(cuda::layer_norm_modulate,
      torch_checks::layer_norm_modulate(x, {shift, scale, weight, bias, eps}, x_rows, &out), x);
}

std::tuple<Tensor, Tensor> gated_residual_norm(Tensor x, Tensor y, OptionalTensor gate, OptionalTensor shift,
                                               OptionalTensor scale, OptionalTensor weight,
                                               OptionalTensor bias, double eps, OptionalTensor x_rows) {
  GatedResidualNorm p = torch_checks::gated_residual_norm(x, y, gate, {shift, scale, weight, bias, eps},
                                                          x_rows, nullptr, nullptr);
  Tensor out = new_out(x, x_rows);
  Tensor norm_out = new_contiguous_out(x, x_rows);
  set_out(p.residual, out);
  set_out(p.norm, norm_out);
  run(cuda::gated_residual_norm, p, x);
  return {out, norm_out};
}

void gated_residual_norm_out(Tensor x, Tensor y, OptionalTensor gate, OptionalTensor shift,
                             OptionalTensor scale, OptionalTensor weight, OptionalTensor bias, double eps,
                             OptionalTensor x_rows, Tensor out, Tensor norm_out) {
  run(cuda::gated_residual_norm,
      torch_checks::gated_residual_norm(x, y, gate, {shift, scale, weight, bias, eps}, x_rows, &out,
                                        &norm_out),
      x);
}

std::tuple<Tensor, Tensor, Tensor> gated_residual_norm_meter(
    Tensor x, Tensor y, OptionalTensor gate, Tensor residual, OptionalTensor residual_scale,
    OptionalTensor shift, OptionalTensor scale, OptionalTensor weight, OptionalTensor bias, double eps,
    OptionalTensor x_rows, OptionalTensor residual_rows, OptionalTensor video_of_row, int64_t num_videos,
    int64_t frames, Integers strides, int64_t metric) {
  auto m = torch_checks::gated_residual_norm_meter(
      x, y, gate, residual, residual_scale, {shift, scale, weight, bias, eps}, x_rows, residual_rows,
      {video_of_row, num_videos, frames, strides, metric}, nullptr, nullptr);
  Tensor out = new_out(x, x_rows);
  Tensor norm_out = new_contiguous_out(x, x_rows);
  set_out(m.parameters.meter, out);
  set_out(m.parameters.norm, norm_out);
  Tensor sums = run_meter(cuda::gated_residual_norm_meter, m, m.parameters.meter.motion, x);
  return {out, norm_out, sums};
}

Tensor gated_residual_norm_meter_out(Tensor x, Tensor y, OptionalTensor gate, Tensor residual,
                                     OptionalTensor residual_scale, OptionalTensor shift,
                                     OptionalTensor scale, OptionalTensor weight, OptionalTensor bias,
                                     double eps, OptionalTensor x_rows, OptionalTensor residual_rows,
                                     OptionalTensor video_of_row, int64_t num_videos, int64_t frames,
                                     Integers strides, int64_t metric, Tensor out, Tensor norm_out) {
  const auto m = torch_checks::gated_residual_norm_meter(
      x, y, gate, residual, residual_scale, {shift, scale, weight, bias, eps}, x_rows, residual_rows,
      {video_of_row, num_videos, frames, strides, metric}, &out, &norm_out);
  return run_meter(cuda::gated_residual_norm_meter, m, m.parameters.meter.motion, x);
}

void decide(Tensor sums, Tensor state, Tensor thresholds, Tensor rates, int64_t step, int64_t num_steps,
            int64_t site, int64_t frames, Integers strides, int64_t metric, int64_t rule, double elements,
            int64_t first_step, int64_t last_step, double scale, double power, double divisor,
            double gradient_weight) {
  const auto d =
      torch_checks::decide(sums, state, thresholds, rates, step, num_steps, site, frames, strides, metric,
                           rule, elements, first_step, last_step, scale, power, divisor, gradient_weight);
  const Target target(sums);
  STD_CUDA_CHECK(cuda::decide(d.rule, d.sums, d.sums_columns, d.state, d.state_columns, d.videos, step, site,
                              target.stream));
}

}  // namespace
}  // namespace adacache::cuda_ops

STABLE_TORCH_LIBRARY_IMPL(adacache, CUDA, library)
{
  library.impl("gated_residual", TORCH_BOX(&adacache::cuda_ops::gated_residual));
  library.impl("gated_residual_out", TORCH_BOX(&adacache::cuda_ops::gated_residual_out));
  library.impl("gated_residual_meter", TORCH_BOX(&adacache::cuda_ops::gated_residual_meter));
  library.impl("gated_residual_meter_out", TORCH_BOX(&adacache::cuda_ops::gated_residual_meter_out));
  library.impl("stack_residual_meter", TORCH_BOX(&adacache::cuda_ops::stack_residual_meter));
  library.impl("stack_residual_meter_out", TORCH_BOX(&adacache::cuda_ops::stack_residual_meter_out));
  library.impl("residual_meter", TORCH_BOX(&adacache::cuda_ops::residual_meter));
  library.impl("reuse_residual", TORCH_BOX(&adacache::cuda_ops::reuse_residual));
  library.impl("reuse_residual_out", TORCH_BOX(&adacache::cuda_ops::reuse_residual_out));
  library.impl("extrapolate_residual", TORCH_BOX(&adacache::cuda_ops::extrapolate_residual));
  library.impl("extrapolate_residual_out", TORCH_BOX(&adacache::cuda_ops::extrapolate_residual_out));
  library.impl("layer_norm_modulate", TORCH_BOX(&adacache::cuda_ops::layer_norm_modulate));
  library.impl("layer_norm_modulate_out", TORCH_BOX(&adacache::cuda_ops::layer_norm_modulate_out));
  library.impl("gated_residual_norm", TORCH_BOX(&adacache::cuda_ops::gated_residual_norm));
  library.impl("gated_residual_norm_out", TORCH_BOX(&adacache::cuda_ops::gated_residual_norm_out));
  library.impl("gated_residual_norm_meter", TORCH_BOX(&adacache::cuda_ops::gated_residual_norm_meter));
  library.impl("gated_residual_norm_meter_out",
               TORCH_BOX(&adacache::cuda_ops::gated_residual_norm_meter_out));
  library.impl("decide", TORCH_BOX(&adacache::cuda_ops::decide));
}

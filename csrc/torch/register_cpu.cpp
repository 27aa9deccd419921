// The schemas of all ops, and their CPU implementations.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "../cpu/ops.h"
#include "attention_checks.h"
#include "checks.h"

namespace adacache::cpu_ops {
namespace {

using torch::stable::Tensor;
using torch_checks::MeterArguments;
using torch_checks::Metered;
using torch_checks::NormArguments;
using torch_checks::OptionalTensor;
using torch_checks::set_out;
using Integers = std::vector<int64_t>;
using Tensors = std::vector<Tensor>;

Tensor prepared(Tensor out) {
  cpu::prepare_fresh_memory(out.mutable_data_ptr(), out.numel() * static_cast<int64_t>(out.element_size()));
  return out;
}

Tensor fresh_out(const Tensor& x, const OptionalTensor& x_rows) {
  return prepared(torch_checks::new_out(x, x_rows));
}

Tensor fresh_contiguous_out(const Tensor& x, const OptionalTensor& x_rows) {
  return prepared(torch_checks::new_contiguous_out(x, x_rows));
}

template <class Parameters>
Tensor run_meter(void (*op)(const Parameters&, const cpu::MeterSums&), const Metered<Parameters>& m,
                 const MotionStrides& motion, const Tensor& like) {
  Tensor sums = torch_checks::new_sums(like, m.num_videos, motion);
  op(m.parameters, {m.video_of_row, m.num_videos, static_cast<double*>(sums.mutable_data_ptr())});
  return sums;
}

Tensor gated_residual(Tensor x, Tensor y, OptionalTensor gate, OptionalTensor x_rows) {
  GatedResidual p = torch_checks::gated_residual(x, y, gate, x_rows, nullptr);
  Tensor out = fresh_out(x, x_rows);
  set_out(p, out);
  cpu::gated_residual(p);
  return out;
}

void gated_residual_out(Tensor x, Tensor y, OptionalTensor gate, OptionalTensor x_rows, Tensor out) {
  cpu::gated_residual(torch_checks::gated_residual(x, y, gate, x_rows, &out));
}

std::tuple<Tensor, Tensor> gated_residual_meter(Tensor x, Tensor y, OptionalTensor gate, Tensor residual,
                                                OptionalTensor residual_scale, OptionalTensor x_rows,
                                                OptionalTensor residual_rows, OptionalTensor video_of_row,
                                                int64_t num_videos, int64_t frames, Integers strides,
                                                int64_t metric) {
  auto m = torch_checks::gated_residual_meter(x, y, gate, residual, residual_scale, x_rows, residual_rows,
                                              {video_of_row, num_videos, frames, strides, metric}, nullptr);
  Tensor out = fresh_out(x, x_rows);
  set_out(m.parameters, out);
  return {out, run_meter(cpu::gated_residual_meter, m, m.parameters.motion, x)};
}

Tensor gated_residual_meter_out(Tensor x, Tensor y, OptionalTensor gate, Tensor residual,
                                OptionalTensor residual_scale, OptionalTensor x_rows,
                                OptionalTensor residual_rows, OptionalTensor video_of_row, int64_t num_videos,
                                int64_t frames, Integers strides, int64_t metric, Tensor out) {
  const auto m =
      torch_checks::gated_residual_meter(x, y, gate, residual, residual_scale, x_rows, residual_rows,
                                         {video_of_row, num_videos, frames, strides, metric}, &out);
  return run_meter(cpu::gated_residual_meter, m, m.parameters.motion, x);
}

Tensor stack_residual_meter(Tensor x_out, Tensor x_in, Tensor residual, OptionalTensor residual_scale,
                            OptionalTensor rows, OptionalTensor video_of_row, int64_t num_videos,
                            int64_t frames, Integers strides, int64_t metric) {
  const auto m =
      torch_checks::stack_residual_meter(x_out, x_in, residual, residual_scale, rows,
                                         {video_of_row, num_videos, frames, strides, metric}, nullptr);
  return run_meter(cpu::stack_residual_meter, m, m.parameters.motion, x_out);
}

Tensor stack_residual_meter_out(Tensor x_out, Tensor x_in, Tensor residual, OptionalTensor residual_scale,
                                OptionalTensor rows, OptionalTensor video_of_row, int64_t num_videos,
                                int64_t frames, Integers strides, int64_t metric, Tensor out) {
  const auto m = torch_checks::stack_residual_meter(
      x_out, x_in, residual, residual_scale, rows, {video_of_row, num_videos, frames, strides, metric}, &out);
  return run_meter(cpu::stack_residual_meter, m, m.parameters.motion, x_out);
}

Tensor residual_meter(Tensor residual, Tensor old, OptionalTensor video_of_row, int64_t num_videos,
                      int64_t frames, Integers strides, int64_t metric) {
  const auto m =
      torch_checks::residual_meter(residual, old, {video_of_row, num_videos, frames, strides, metric});
  return run_meter(cpu::residual_meter, m, m.parameters.motion, residual);
}

Tensor reuse_residual(Tensor x, Tensor residual, OptionalTensor residual_scale, OptionalTensor x_rows,
                      OptionalTensor residual_rows, OptionalTensor video_of_row, OptionalTensor reuse) {
  ReuseResidual p = torch_checks::reuse_residual(x, residual, residual_scale, x_rows, residual_rows,
                                                 video_of_row, reuse, nullptr);
  Tensor out = fresh_out(x, x_rows);
  set_out(p, out);
  cpu::reuse_residual(p);
  return out;
}

void reuse_residual_out(Tensor x, Tensor residual, OptionalTensor residual_scale, OptionalTensor x_rows,
                        OptionalTensor residual_rows, OptionalTensor video_of_row, OptionalTensor reuse,
                        Tensor out) {
  cpu::reuse_residual(torch_checks::reuse_residual(x, residual, residual_scale, x_rows, residual_rows,
                                                   video_of_row, reuse, &out));
}

Tensor extrapolate_residual(Tensor x, Tensors factors, Tensor coefficients, OptionalTensor x_rows,
                            OptionalTensor residual_rows, OptionalTensor video_of_row) {
  ExtrapolateResidual p = torch_checks::extrapolate_residual(x, factors, coefficients, x_rows, residual_rows,
                                                             video_of_row, nullptr);
  Tensor out = fresh_out(x, x_rows);
  set_out(p, out);
  cpu::extrapolate_residual(p);
  return out;
}

void extrapolate_residual_out(Tensor x, Tensors factors, Tensor coefficients, OptionalTensor x_rows,
                              OptionalTensor residual_rows, OptionalTensor video_of_row, Tensor out) {
  cpu::extrapolate_residual(torch_checks::extrapolate_residual(x, factors, coefficients, x_rows,
                                                               residual_rows, video_of_row, &out));
}

Tensor layer_norm_modulate(Tensor x, OptionalTensor shift, OptionalTensor scale, OptionalTensor weight,
                           OptionalTensor bias, double eps, OptionalTensor x_rows) {
  LayerNormModulate p =
      torch_checks::layer_norm_modulate(x, {shift, scale, weight, bias, eps}, x_rows, nullptr);
  Tensor out = fresh_out(x, x_rows);
  set_out(p.norm, out);
  cpu::layer_norm_modulate(p);
  return out;
}

void layer_norm_modulate_out(Tensor x, OptionalTensor shift, OptionalTensor scale, OptionalTensor weight,
                             OptionalTensor bias, double eps, OptionalTensor x_rows, Tensor out) {
  cpu::layer_norm_modulate(
      torch_checks::layer_norm_modulate(x, {shift, scale, weight, bias, eps}, x_rows, &out));
}

std::tuple<Tensor, Tensor> gated_residual_norm(Tensor x, Tensor y, OptionalTensor gate, OptionalTensor shift,
                                               OptionalTensor scale, OptionalTensor weight,
                                               OptionalTensor bias, double eps, OptionalTensor x_rows) {
  GatedResidualNorm p = torch_checks::gated_residual_norm(x, y, gate, {shift, scale, weight, bias, eps},
                                                          x_rows, nullptr, nullptr);
  Tensor out = fresh_out(x, x_rows);
  Tensor norm_out = fresh_contiguous_out(x, x_rows);
  set_out(p.residual, out);
  set_out(p.norm, norm_out);
  cpu::gated_residual_norm(p);
  return {out, norm_out};
}

void gated_residual_norm_out(Tensor x, Tensor y, OptionalTensor gate, OptionalTensor shift,
                             OptionalTensor scale, OptionalTensor weight, OptionalTensor bias, double eps,
                             OptionalTensor x_rows, Tensor out, Tensor norm_out) {
  cpu::gated_residual_norm(torch_checks::gated_residual_norm(x, y, gate, {shift, scale, weight, bias, eps},
                                                             x_rows, &out, &norm_out));
}

std::tuple<Tensor, Tensor, Tensor> gated_residual_norm_meter(
    Tensor x, Tensor y, OptionalTensor gate, Tensor residual, OptionalTensor residual_scale,
    OptionalTensor shift, OptionalTensor scale, OptionalTensor weight, OptionalTensor bias, double eps,
    OptionalTensor x_rows, OptionalTensor residual_rows, OptionalTensor video_of_row, int64_t num_videos,
    int64_t frames, Integers strides, int64_t metric) {
  auto m = torch_checks::gated_residual_norm_meter(
      x, y, gate, residual, residual_scale, {shift, scale, weight, bias, eps}, x_rows, residual_rows,
      {video_of_row, num_videos, frames, strides, metric}, nullptr, nullptr);
  Tensor out = fresh_out(x, x_rows);
  Tensor norm_out = fresh_contiguous_out(x, x_rows);
  set_out(m.parameters.meter, out);
  set_out(m.parameters.norm, norm_out);
  Tensor sums = run_meter(cpu::gated_residual_norm_meter, m, m.parameters.meter.motion, x);
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
  return run_meter(cpu::gated_residual_norm_meter, m, m.parameters.meter.motion, x);
}

void fused_qk_norm_rope(Tensor qkv, OptionalTensor q_weight, OptionalTensor k_weight, OptionalTensor cos,
                        OptionalTensor sin, bool interleaved, double eps) {
  cpu::fused_qk_norm_rope(
      torch_checks::fused_qk_norm_rope(qkv, {q_weight, k_weight, cos, sin, interleaved, eps}));
}

Tensor temporal_attention(Tensor qkv, OptionalTensor q_weight, OptionalTensor k_weight, OptionalTensor cos,
                          OptionalTensor sin, bool interleaved, int64_t frames, double eps, double scale) {
  TemporalAttention p = torch_checks::temporal_attention(
      qkv, {q_weight, k_weight, cos, sin, interleaved, eps}, frames, scale, nullptr);
  Tensor out = prepared(torch_checks::new_attention_out(qkv));
  set_out(p, out);
  cpu::temporal_attention(p);
  return out;
}

void temporal_attention_out(Tensor qkv, OptionalTensor q_weight, OptionalTensor k_weight, OptionalTensor cos,
                            OptionalTensor sin, bool interleaved, int64_t frames, double eps, double scale,
                            Tensor out) {
  cpu::temporal_attention(torch_checks::temporal_attention(
      qkv, {q_weight, k_weight, cos, sin, interleaved, eps}, frames, scale, &out));
}

void decide(Tensor sums, Tensor state, Tensor thresholds, Tensor rates, int64_t step, int64_t num_steps,
            int64_t site, int64_t frames, Integers strides, int64_t metric, int64_t rule, double elements,
            int64_t first_step, int64_t last_step, double scale, double power, double divisor,
            double gradient_weight) {
  const auto d =
      torch_checks::decide(sums, state, thresholds, rates, step, num_steps, site, frames, strides, metric,
                           rule, elements, first_step, last_step, scale, power, divisor, gradient_weight);
  for (int64_t video = 0; video < d.videos; ++video)
    adacache::decide(d.state + video * d.state_columns, d.sums + video * d.sums_columns, d.rule, step, site);
}

}  // namespace
}  // namespace adacache::cpu_ops

STABLE_TORCH_LIBRARY(adacache, library)
{
  const std::string meter = "Tensor? video_of_row, int num_videos, int frames, int[] strides, int metric";
  const std::string norm = "Tensor? shift, Tensor? scale, Tensor? weight, Tensor? bias, float eps";
  // An op, and the same op with outputs that the caller gives.
  const auto define = [&](const std::string& name, const std::string& arguments, const std::string& results,
                          const std::string& outputs = "", const std::string& other_results = "") {
    library.def((name + "(" + arguments + ") -> " + results).c_str());
    if (!outputs.empty())
      library.def((name + "_out(" + arguments + ", " + outputs + ") -> " + other_results).c_str());
  };
  define("gated_residual", "Tensor x, Tensor y, Tensor? gate, Tensor? x_rows", "Tensor", "Tensor(a!) out",
         "()");
  define("gated_residual_meter",
         "Tensor x, Tensor y, Tensor? gate, Tensor(a!) residual, Tensor(b!)? residual_scale, Tensor? x_rows, "
         "Tensor? residual_rows, " +
             meter,
         "(Tensor, Tensor)", "Tensor(c!) out", "Tensor");
  define("stack_residual_meter",
         "Tensor x_out, Tensor x_in, Tensor(a!) residual, Tensor(b!)? residual_scale, Tensor? rows, " + meter,
         "Tensor", "Tensor(c!) out", "Tensor");
  define("residual_meter", "Tensor residual, Tensor old, " + meter, "Tensor");
  define("reuse_residual",
         "Tensor x, Tensor residual, Tensor? residual_scale, Tensor? x_rows, Tensor? residual_rows, "
         "Tensor? video_of_row, Tensor? reuse",
         "Tensor", "Tensor(a!) out", "()");
  define("extrapolate_residual",
         "Tensor x, Tensor[] factors, Tensor coefficients, Tensor? x_rows, Tensor? residual_rows, "
         "Tensor? video_of_row",
         "Tensor", "Tensor(a!) out", "()");
  define("layer_norm_modulate", "Tensor x, " + norm + ", Tensor? x_rows", "Tensor", "Tensor(a!) out", "()");
  define("gated_residual_norm", "Tensor x, Tensor y, Tensor? gate, " + norm + ", Tensor? x_rows",
         "(Tensor, Tensor)", "Tensor(a!) out, Tensor(b!) norm_out", "()");
  define("gated_residual_norm_meter",
         "Tensor x, Tensor y, Tensor? gate, Tensor(a!) residual, Tensor(b!)? residual_scale, " + norm +
             ", Tensor? x_rows, Tensor? residual_rows, " + meter,
         "(Tensor, Tensor, Tensor)", "Tensor(c!) out, Tensor(d!) norm_out", "Tensor");
  define("decide",
         "Tensor sums, Tensor(a!) state, Tensor thresholds, Tensor rates, int step, int num_steps, int site, "
         "int frames, int[] strides, int metric, int rule, float elements, int first_step, int last_step, "
         "float scale, float power, float divisor, float gradient_weight",
         "()");
  const std::string norm_and_rope =
      "Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, bool interleaved";
  define("fused_qk_norm_rope", "Tensor(a!) qkv, " + norm_and_rope + ", float eps", "()");
  define("temporal_attention", "Tensor qkv, " + norm_and_rope + ", int frames, float eps, float scale",
         "Tensor", "Tensor(a!) out", "()");
}

STABLE_TORCH_LIBRARY_IMPL(adacache, CPU, library)
{
  library.impl("gated_residual", TORCH_BOX(&adacache::cpu_ops::gated_residual));
  library.impl("gated_residual_out", TORCH_BOX(&adacache::cpu_ops::gated_residual_out));
  library.impl("gated_residual_meter", TORCH_BOX(&adacache::cpu_ops::gated_residual_meter));
  library.impl("gated_residual_meter_out", TORCH_BOX(&adacache::cpu_ops::gated_residual_meter_out));
  library.impl("stack_residual_meter", TORCH_BOX(&adacache::cpu_ops::stack_residual_meter));
  library.impl("stack_residual_meter_out", TORCH_BOX(&adacache::cpu_ops::stack_residual_meter_out));
  library.impl("residual_meter", TORCH_BOX(&adacache::cpu_ops::residual_meter));
  library.impl("reuse_residual", TORCH_BOX(&adacache::cpu_ops::reuse_residual));
  library.impl("reuse_residual_out", TORCH_BOX(&adacache::cpu_ops::reuse_residual_out));
  library.impl("extrapolate_residual", TORCH_BOX(&adacache::cpu_ops::extrapolate_residual));
  library.impl("extrapolate_residual_out", TORCH_BOX(&adacache::cpu_ops::extrapolate_residual_out));
  library.impl("layer_norm_modulate", TORCH_BOX(&adacache::cpu_ops::layer_norm_modulate));
  library.impl("layer_norm_modulate_out", TORCH_BOX(&adacache::cpu_ops::layer_norm_modulate_out));
  library.impl("gated_residual_norm", TORCH_BOX(&adacache::cpu_ops::gated_residual_norm));
  library.impl("gated_residual_norm_out", TORCH_BOX(&adacache::cpu_ops::gated_residual_norm_out));
  library.impl("gated_residual_norm_meter", TORCH_BOX(&adacache::cpu_ops::gated_residual_norm_meter));
  library.impl("gated_residual_norm_meter_out", TORCH_BOX(&adacache::cpu_ops::gated_residual_norm_meter_out));
  library.impl("decide", TORCH_BOX(&adacache::cpu_ops::decide));
  library.impl("fused_qk_norm_rope", TORCH_BOX(&adacache::cpu_ops::fused_qk_norm_rope));
  library.impl("temporal_attention", TORCH_BOX(&adacache::cpu_ops::temporal_attention));
  library.impl("temporal_attention_out", TORCH_BOX(&adacache::cpu_ops::temporal_attention_out));
}

// The schemas of all ops, and their CPU implementations.
#include <tuple>

#include "../cpu/ops.h"
#include "checks.h"

namespace adacache::cpu_ops {
namespace {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Integers = std::vector<int64_t>;

Tensor fresh_like(const Tensor& x) {
  Tensor out = torch::stable::empty_like(x);
  cpu::prepare_fresh_memory(out.mutable_data_ptr(), out.numel() * static_cast<int64_t>(out.element_size()));
  return out;
}

Tensor run(const GatedResidualMeter& p, const Tensor& x, const int32_t* video_of_row, int64_t num_videos) {
  Tensor sums = torch_checks::new_sums(x, num_videos, p.motion);
  cpu::gated_residual_meter(p, video_of_row, num_videos, static_cast<double*>(sums.mutable_data_ptr()));
  return sums;
}

std::tuple<Tensor, Tensor> gated_residual_meter(Tensor x, Tensor y, Tensor gate, Tensor residual,
                                                OptionalTensor video_of_row, int64_t num_videos,
                                                int64_t frames, Integers strides, int64_t metric) {
  GatedResidualMeter p =
      torch_checks::gated_residual_meter(x, y, gate, residual, frames, strides, metric, nullptr);
  const int32_t* ids = torch_checks::checked_video_of_row(video_of_row, "x", x, num_videos);
  Tensor out = fresh_like(x);
  torch_checks::set_fresh_out(p, out);
  Tensor sums = run(p, x, ids, num_videos);
  return {out, sums};
}

Tensor gated_residual_meter_out(Tensor x, Tensor y, Tensor gate, Tensor residual, OptionalTensor video_of_row,
                                int64_t num_videos, int64_t frames, Integers strides, int64_t metric,
                                Tensor out) {
  const GatedResidualMeter p =
      torch_checks::gated_residual_meter(x, y, gate, residual, frames, strides, metric, &out);
  return run(p, x, torch_checks::checked_video_of_row(video_of_row, "x", x, num_videos), num_videos);
}

Tensor residual_meter(Tensor residual, Tensor old, OptionalTensor video_of_row, int64_t num_videos,
                      int64_t frames, Integers strides, int64_t metric) {
  const ResidualMeter p = torch_checks::residual_meter(residual, old, frames, strides, metric);
  const int32_t* ids = torch_checks::checked_video_of_row(video_of_row, "residual", residual, num_videos);
  Tensor sums = torch_checks::new_sums(residual, num_videos, p.motion);
  cpu::residual_meter(p, ids, num_videos, static_cast<double*>(sums.mutable_data_ptr()));
  return sums;
}

Tensor reuse_residual(Tensor x, Tensor residual, OptionalTensor video_of_row, OptionalTensor reuse) {
  ReuseResidual p = torch_checks::reuse_residual(x, residual, video_of_row, reuse, nullptr);
  Tensor out = fresh_like(x);
  torch_checks::set_fresh_out(p, out);
  cpu::reuse_residual(p);
  return out;
}

void reuse_residual_out(Tensor x, Tensor residual, OptionalTensor video_of_row, OptionalTensor reuse,
                        Tensor out) {
  cpu::reuse_residual(torch_checks::reuse_residual(x, residual, video_of_row, reuse, &out));
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
  library.def(
      "gated_residual_meter(Tensor x, Tensor y, Tensor gate, Tensor(a!) residual, Tensor? video_of_row, "
      "int num_videos, int frames, int[] strides, int metric) -> (Tensor, Tensor)");
  library.def(
      "gated_residual_meter_out(Tensor x, Tensor y, Tensor gate, Tensor(a!) residual, Tensor? video_of_row, "
      "int num_videos, int frames, int[] strides, int metric, Tensor(b!) out) -> Tensor");
  library.def(
      "residual_meter(Tensor residual, Tensor old, Tensor? video_of_row, int num_videos, int frames, int[] "
      "strides, "
      "int metric) -> Tensor");
  library.def("reuse_residual(Tensor x, Tensor residual, Tensor? video_of_row, Tensor? reuse) -> Tensor");
  library.def(
      "reuse_residual_out(Tensor x, Tensor residual, Tensor? video_of_row, Tensor? reuse, Tensor(a!) out) -> "
      "()");
  library.def(
      "decide(Tensor sums, Tensor(a!) state, Tensor thresholds, Tensor rates, int step, int num_steps, int "
      "site, "
      "int frames, int[] strides, int metric, int rule, float elements, int first_step, int last_step, float "
      "scale, "
      "float power, float divisor, float gradient_weight) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(adacache, CPU, library)
{
  library.impl("gated_residual_meter", TORCH_BOX(&adacache::cpu_ops::gated_residual_meter));
  library.impl("gated_residual_meter_out", TORCH_BOX(&adacache::cpu_ops::gated_residual_meter_out));
  library.impl("residual_meter", TORCH_BOX(&adacache::cpu_ops::residual_meter));
  library.impl("reuse_residual", TORCH_BOX(&adacache::cpu_ops::reuse_residual));
  library.impl("reuse_residual_out", TORCH_BOX(&adacache::cpu_ops::reuse_residual_out));
  library.impl("decide", TORCH_BOX(&adacache::cpu_ops::decide));
}

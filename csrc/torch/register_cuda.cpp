// The CUDA implementations of the ops, whose schemas the CPU library defines.
#ifndef USE_CUDA
#define USE_CUDA  // The stable headers declare the CUDA part of the ABI only then.
#endif
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <tuple>

#include "../cuda/ops.h"
#include "checks.h"

namespace adacache::cuda_ops {
namespace {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Integers = std::vector<int64_t>;

// The device of a tensor made current, and the stream that PyTorch uses there now.
struct Target {
  explicit Target(const Tensor& tensor) : guard(tensor.get_device_index()) {
    void* current = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
};

Tensor workspace_for(const Tensor& like, int64_t elements) {
  return torch::stable::new_empty(like, {&elements, 1}, torch::headeronly::ScalarType::Double);
}

void require_grid(int64_t blocks) {
  torch_checks::require(blocks < int64_t{1} << 31, "x: too large for one launch: ", blocks, " blocks");
}

template <class Parameters, class Launch>
Tensor run_meter(const Parameters& p, const Tensor& x, const int32_t* video_of_row, int64_t num_videos,
                 const Launch& launch) {
  const Target target(x);
  Tensor sums = torch_checks::new_sums(x, num_videos, p.motion);
  const cuda::MeterLaunch plan = cuda::plan(p);
  require_grid(plan.blocks);
  Tensor workspace = workspace_for(x, plan.workspace_elements);
  STD_CUDA_CHECK(launch(p, plan, static_cast<double*>(workspace.mutable_data_ptr()), video_of_row, num_videos,
                        static_cast<double*>(sums.mutable_data_ptr()), target.stream));
  return sums;
}

void run_reuse(const ReuseResidual& p, const Tensor& x) {
  const Target target(x);
  require_grid(p.rows * reuse_blocks_per_row(p, 1, 256));
  STD_CUDA_CHECK(cuda::reuse_residual(p, target.stream));
}

std::tuple<Tensor, Tensor> gated_residual_meter(Tensor x, Tensor y, Tensor gate, Tensor residual,
                                                OptionalTensor video_of_row, int64_t num_videos,
                                                int64_t frames, Integers strides, int64_t metric) {
  GatedResidualMeter p =
      torch_checks::gated_residual_meter(x, y, gate, residual, frames, strides, metric, nullptr);
  const int32_t* ids = torch_checks::checked_video_of_row(video_of_row, "x", x, num_videos);
  Tensor out = torch::stable::empty_like(x);
  torch_checks::set_fresh_out(p, out);
  Tensor sums = run_meter(p, x, ids, num_videos, cuda::gated_residual_meter);
  return {out, sums};
}

Tensor gated_residual_meter_out(Tensor x, Tensor y, Tensor gate, Tensor residual, OptionalTensor video_of_row,
                                int64_t num_videos, int64_t frames, Integers strides, int64_t metric,
                                Tensor out) {
  const GatedResidualMeter p =
      torch_checks::gated_residual_meter(x, y, gate, residual, frames, strides, metric, &out);
  const int32_t* ids = torch_checks::checked_video_of_row(video_of_row, "x", x, num_videos);
  return run_meter(p, x, ids, num_videos, cuda::gated_residual_meter);
}

Tensor residual_meter(Tensor residual, Tensor old, OptionalTensor video_of_row, int64_t num_videos,
                      int64_t frames, Integers strides, int64_t metric) {
  const ResidualMeter p = torch_checks::residual_meter(residual, old, frames, strides, metric);
  const int32_t* ids = torch_checks::checked_video_of_row(video_of_row, "residual", residual, num_videos);
  return run_meter(p, residual, ids, num_videos, cuda::residual_meter);
}

Tensor reuse_residual(Tensor x, Tensor residual, OptionalTensor video_of_row, OptionalTensor reuse) {
  ReuseResidual p = torch_checks::reuse_residual(x, residual, video_of_row, reuse, nullptr);
  Tensor out = torch::stable::empty_like(x);
  torch_checks::set_fresh_out(p, out);
  run_reuse(p, x);
  return out;
}

void reuse_residual_out(Tensor x, Tensor residual, OptionalTensor video_of_row, OptionalTensor reuse,
                        Tensor out) {
  run_reuse(torch_checks::reuse_residual(x, residual, video_of_row, reuse, &out), x);
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
  library.impl("gated_residual_meter", TORCH_BOX(&adacache::cuda_ops::gated_residual_meter));
  library.impl("gated_residual_meter_out", TORCH_BOX(&adacache::cuda_ops::gated_residual_meter_out));
  library.impl("residual_meter", TORCH_BOX(&adacache::cuda_ops::residual_meter));
  library.impl("reuse_residual", TORCH_BOX(&adacache::cuda_ops::reuse_residual));
  library.impl("reuse_residual_out", TORCH_BOX(&adacache::cuda_ops::reuse_residual_out));
  library.impl("decide", TORCH_BOX(&adacache::cuda_ops::decide));
}

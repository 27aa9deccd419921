// SPDX-License-Identifier: Apache-2.0
// Registers the CUDA kernels. The CPU library defines the schemas.
#ifndef USE_CUDA
#define USE_CUDA  // required by the stable headers to declare the CUDA part of the ABI
#endif
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "../cuda/ops.h"
#include "register.h"
#include "schemas.h"  // generated from adacache_kernels/_schemas.py

namespace adacache::cuda_ops {
namespace {

using torch::stable::Tensor;

namespace kernels {
using namespace adacache::cuda;  // NOLINT: kernels have the names of their ops

cudaError_t rms_norm_modulate(const LayerNormModulate& p, cudaStream_t stream) {
  return cuda::layer_norm_modulate(p, stream);
}

cudaError_t decide(const torch_checks::Decide& d, cudaStream_t stream) {
  return cuda::decide(d.rule, d.schedules, d.sums, d.sums_columns, d.state, d.state_columns, d.videos, d.site,
                      stream);
}
}  // namespace kernels

// Sets the current device to that of the tensor; `stream` is the current PyTorch stream of that device.
struct Target {
  explicit Target(const Tensor& tensor) : guard(tensor.get_device_index()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
};

struct Backend {
  static constexpr void (*prepare)(Tensor&) = nullptr;

  template <class Parameters>
  static void run(cudaError_t (*kernel)(const Parameters&, cudaStream_t), const Parameters& p,
                  const Tensor& like) {
    const Target target(like);
    STD_CUDA_CHECK(kernel(p, target.stream));
  }

  template <class Parameters>
  static void meter(cudaError_t (*kernel)(const Parameters&, const cuda::MeterSums&, cudaStream_t),
                    const torch_checks::Metered<Parameters>& m, Tensor& sums) {
    const Target target(sums);
    const int64_t elements = cuda::workspace_elements(m.parameters);
    Tensor workspace = torch::stable::new_empty(sums, {&elements, 1});
    STD_CUDA_CHECK(kernel(m.parameters,
                          {m.video_of_row, m.num_videos, static_cast<double*>(sums.mutable_data_ptr()),
                           static_cast<double*>(workspace.mutable_data_ptr())},
                          target.stream));
  }
};

}  // namespace
}  // namespace adacache::cuda_ops

ADACACHE_SCHEMAS_DIGEST;

STABLE_TORCH_LIBRARY_IMPL(adacache, CUDA, library)
{
  using namespace adacache::cuda_ops;
  ADACACHE_COMMON_OPS;
}

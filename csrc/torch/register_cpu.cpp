// SPDX-License-Identifier: Apache-2.0
// Defines the schemas of all ops, and registers the CPU kernels.
#include "../cpu/ops.h"
#include "register.h"
#include "schemas.h"  // generated from adacache_kernels/_schemas.py

namespace adacache::cpu_ops {
namespace {

using torch::stable::Tensor;

namespace kernels {
using namespace adacache::cpu;  // NOLINT: kernels have the names of their ops

void rms_norm_modulate(const LayerNormModulate& p) { cpu::layer_norm_modulate(p); }
void norm_modulate_float8(const LayerNormModulate& p) { cpu::layer_norm_modulate(p); }
void gated_residual_norm_float8(const GatedResidualNorm& p) { cpu::gated_residual_norm(p); }

void decide(const torch_checks::Decide& d) {
  for (int64_t video = 0; video < d.videos; ++video)
    adacache::decide(d.state + video * d.state_columns, d.sums + video * d.sums_columns, d.rule,
                     schedule_of(d.schedules, video), d.site);
}
}  // namespace kernels

struct Backend {
  static void prepare(Tensor& fresh) {
    cpu::prepare_fresh_memory(fresh.mutable_data_ptr(),
                              fresh.numel() * static_cast<int64_t>(fresh.element_size()));
  }

  template <class Parameters>
  static void run(void (*kernel)(const Parameters&), const Parameters& p, const Tensor&) {
    kernel(p);
  }

  template <class Parameters>
  static void meter(void (*kernel)(const Parameters&, const cpu::MeterSums&),
                    const torch_checks::Metered<Parameters>& m, Tensor& sums) {
    kernel(m.parameters, {m.video_of_row, m.num_videos, static_cast<double*>(sums.mutable_data_ptr())});
  }
};

}  // namespace
}  // namespace adacache::cpu_ops

ADACACHE_SCHEMAS_DIGEST;

STABLE_TORCH_LIBRARY(adacache, library)
{
  for (const char* schema : adacache_schemas) library.def(schema);
}

STABLE_TORCH_LIBRARY_IMPL(adacache, CPU, library)
{
  using namespace adacache::cpu_ops;
  ADACACHE_COMMON_OPS;
  ADACACHE_OP(fused_qk_norm_rope);
  ADACACHE_OP_WITH_OUT(temporal_attention);
}

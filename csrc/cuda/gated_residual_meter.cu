// gated_residual_meter on CUDA.
#include "block.cuh"

namespace adacache::cuda {

template <class T, int width, bool all_columns>
__global__ void __launch_bounds__(block_threads, all_columns ? blocks_per_multiprocessor_all_columns
                                                             : blocks_per_multiprocessor)
gated_residual_meter(const __grid_constant__ GatedResidualMeter p, double* partials) {
  DeviceBlock block;
  gated_residual_meter_body<T, width, all_columns>(block, p, partials);
}

MeterLaunch plan(const GatedResidualMeter& p) { return plan_meter(p); }

cudaError_t gated_residual_meter(const GatedResidualMeter& p, const MeterLaunch& launch, double* workspace,
                                 const int32_t* video_of_row, int64_t num_videos, double* sums,
                                 cudaStream_t stream) {
  if (launch.blocks > 0) {
    dispatch(p.dtype, [&](auto element) {
      using T = decltype(element);
      constexpr int wide = vector_width<T>;
      // Single elements are the exception: one kernel for them measures all columns.
      const auto kernel = launch.width == 1 ? gated_residual_meter<T, 1, true>
                          : p.all_columns   ? gated_residual_meter<T, wide, true>
                                            : gated_residual_meter<T, wide, false>;
      kernel<<<static_cast<unsigned>(launch.blocks), block_threads,
               meter_shared_bytes(block_threads, p.motion), stream>>>(p, workspace);
    });
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  return finish_meter(p, launch, workspace, video_of_row, num_videos, sums, stream);
}

}  // namespace adacache::cuda

// gated_residual_meter on the CPU.
#include "ops.h"
#include "parallel.h"

namespace adacache::cpu {

void gated_residual_meter(const GatedResidualMeter& p, const int32_t* video_of_row, int64_t num_videos,
                          double* sums) {
  const Units units = units_of(p.shape, p.dtype);
  const int64_t elements = p.shape.rows * p.shape.frames * p.shape.places * p.shape.channels;
  const bool streaming =
      worth_streaming(p.out, p.x, p.out_strides, elements, p.dtype == DType::float32 ? 4 : 2);
  const Kernels& chosen = kernels();
  meter(p.shape, units, p.dtype, p.motion, p.all_columns, video_of_row, num_videos, sums,
        [&](int64_t unit, double* partial) {
          chosen.gated_residual_meter(p, units, unit, streaming, partial);
        });
}

}  // namespace adacache::cpu

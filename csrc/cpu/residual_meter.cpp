// residual_meter on the CPU.
#include "ops.h"
#include "parallel.h"

namespace adacache::cpu {

void residual_meter(const ResidualMeter& p, const int32_t* video_of_row, int64_t num_videos, double* sums) {
  const Units units = units_of(p.shape, p.dtype);
  const Kernels& chosen = kernels();
  meter(p.shape, units, p.dtype, p.motion, p.all_columns, video_of_row, num_videos, sums,
        [&](int64_t unit, double* partial) { chosen.residual_meter(p, units, unit, partial); });
}

}  // namespace adacache::cpu

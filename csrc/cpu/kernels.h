// The CPU kernels and the choice among their copies, one per instruction set.
#pragma once

#include "../core/gated_residual_meter.h"
#include "../core/residual_meter.h"
#include "../core/reuse_residual.h"

namespace adacache::cpu {

// A unit of work: all frames of some neighbouring places of one row, so that a frame meets the earlier ones
// in the cache. Units depend on the shape alone, and so do the sums.
struct Units {
  int64_t places_per_unit;
  int64_t per_row;
  int64_t count;
};

// Each processes one unit; the meters leave its sums, one per column, in `partial`.
struct Kernels {
  const char* name;
  void (*gated_residual_meter)(const GatedResidualMeter&, const Units&, int64_t unit, bool streaming,
                               double* partial);
  void (*residual_meter)(const ResidualMeter&, const Units&, int64_t unit, double* partial);
  // Tokens [first, last) of one row; `reuse` says whether this row does.
  void (*reuse_residual)(const ReuseResidual&, int64_t row, int64_t first, int64_t last, bool reuse,
                         bool streaming);
};

extern const Kernels baseline_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

// The best copy for this processor. ADACACHE_CPU_ISA=baseline|avx2|avx512 in the environment asks for another
// one.
const Kernels& kernels();

Units units_of(const MeterShape& shape, DType dtype);

}  // namespace adacache::cpu

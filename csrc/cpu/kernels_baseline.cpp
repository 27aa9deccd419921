// The CPU kernels for any processor of this architecture.
#define ADACACHE_ISA baseline
#define ADACACHE_KERNELS baseline_kernels
#define ADACACHE_KERNELS_NAME "baseline"
#include "isa/kernels.h"

// SPDX-License-Identifier: Apache-2.0
// The CPU kernels for the baseline instruction set of the architecture.
#define ADACACHE_ISA baseline
#define ADACACHE_KERNELS baseline_kernels
#define ADACACHE_KERNELS_NAME "baseline"
#include "isa/kernels.h"

// SPDX-License-Identifier: Apache-2.0
// The CPU kernels for x86-64 with AVX2 and F16C.
#define ADACACHE_ISA avx2
#define ADACACHE_KERNELS avx2_kernels
#define ADACACHE_KERNELS_NAME "avx2"
#include "isa/kernels.h"

// SPDX-License-Identifier: Apache-2.0
// The CPU kernels for x86-64 with AVX-512 (F, BW, DQ, VL).
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns about intentionally uninitialized registers in its own headers.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#define ADACACHE_ISA avx512
#define ADACACHE_KERNELS avx512_kernels
#define ADACACHE_KERNELS_NAME "avx512"
#include "isa/kernels.h"

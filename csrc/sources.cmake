# SPDX-License-Identifier: Apache-2.0
# Sources of the three libraries and per-file options. Paths are relative to the repository.
set(ADACACHE_CPU_SOURCES
    csrc/cpu/extrapolate_residual.cpp
    csrc/cpu/extrapolate_residual_meter.cpp
    csrc/cpu/fresh_memory.cpp
    csrc/cpu/fused_qk_norm_rope.cpp
    csrc/cpu/gated_residual.cpp
    csrc/cpu/gated_residual_meter.cpp
    csrc/cpu/gated_residual_norm.cpp
    csrc/cpu/gated_residual_norm_meter.cpp
    csrc/cpu/kernels.cpp
    csrc/cpu/kernels_baseline.cpp
    csrc/cpu/layer_norm_modulate.cpp
    csrc/cpu/residual_meter.cpp
    csrc/cpu/reuse_residual.cpp
    csrc/cpu/stack_residual_meter.cpp
    csrc/cpu/temporal_attention.cpp
    csrc/torch/register_cpu.cpp)
set(ADACACHE_ENGINE_SOURCES csrc/engine/engine.cpp)
set(ADACACHE_CUDA_SOURCES
    csrc/cuda/decide.cu
    csrc/cuda/extrapolate_residual.cu
    csrc/cuda/extrapolate_residual_meter.cu
    csrc/cuda/gated_residual.cu
    csrc/cuda/gated_residual_meter.cu
    csrc/cuda/gated_residual_norm.cu
    csrc/cuda/gated_residual_norm_float8.cu
    csrc/cuda/gated_residual_norm_meter.cu
    csrc/cuda/layer_norm_modulate.cu
    csrc/cuda/norm_modulate_float8.cu
    csrc/cuda/residual_meter.cu
    csrc/cuda/reuse_residual.cu
    csrc/cuda/stack_residual_meter.cu
    csrc/cuda/video_sums.cu
    csrc/torch/register_cuda.cpp)

# No fused multiply-add: results must be bit-identical across compilers.
set(ADACACHE_CXX_OPTIONS -O3 -ffp-contract=off)
set(ADACACHE_CUDA_OPTIONS -O3 --fmad=false)

if(ADACACHE_QUICK)
  list(APPEND ADACACHE_CXX_OPTIONS -O1)  # the last -O option takes effect
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(ADACACHE_CPU_DEFINITIONS ADACACHE_X86_ISAS)
  list(APPEND ADACACHE_CPU_SOURCES csrc/cpu/kernels_avx2.cpp csrc/cpu/kernels_avx512.cpp)
  set_source_files_properties(csrc/cpu/kernels_avx2.cpp PROPERTIES COMPILE_OPTIONS "-mavx2;-mf16c")
  set_source_files_properties(
    csrc/cpu/kernels_avx512.cpp PROPERTIES COMPILE_OPTIONS "-mavx2;-mf16c;-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mprefer-vector-width=512")
endif()

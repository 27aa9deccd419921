# SPDX-License-Identifier: Apache-2.0
"""The ops as Triton kernels, for GPUs without the compiled CUDA library and for tests without a GPU.

They are registered as torch.ops.adacache_triton.* with the schemas of the compiled ops, so that torch.compile
treats each launch as an opaque op. The caller allocates outputs.
"""

from __future__ import annotations

import torch

from .._fakes import FAKE_KERNELS
from .._schemas import SCHEMAS
from .decide import decide
from .extrapolate_residual import extrapolate_residual
from .extrapolate_residual_meter import extrapolate_residual_meter
from .fused_qk_norm_rope import fused_qk_norm_rope
from .gated_residual import gated_residual
from .gated_residual_meter import gated_residual_meter
from .gated_residual_norm import gated_residual_norm
from .gated_residual_norm_float8 import gated_residual_norm_float8
from .gated_residual_norm_meter import gated_residual_norm_meter
from .layer_norm_modulate import layer_norm_modulate
from .norm_modulate_float8 import norm_modulate_float8
from .numeric import INTERPRETED
from .residual_meter import residual_meter
from .reuse_residual import reuse_residual
from .rms_norm_modulate import rms_norm_modulate
from .stack_residual_meter import stack_residual_meter
from .temporal_attention import temporal_attention

__all__ = ["INTERPRETED"]

_LAUNCHERS = {
    "gated_residual_out": gated_residual,
    "gated_residual_meter_out": gated_residual_meter,
    "stack_residual_meter": stack_residual_meter,
    "stack_residual_meter_out": stack_residual_meter,
    "residual_meter": residual_meter,
    "reuse_residual_out": reuse_residual,
    "extrapolate_residual_out": extrapolate_residual,
    "extrapolate_residual_meter_out": extrapolate_residual_meter,
    "layer_norm_modulate_out": layer_norm_modulate,
    "rms_norm_modulate_out": rms_norm_modulate,
    "norm_modulate_float8_out": norm_modulate_float8,
    "gated_residual_norm_out": gated_residual_norm,
    "gated_residual_norm_float8_out": gated_residual_norm_float8,
    "gated_residual_norm_meter_out": gated_residual_norm_meter,
    "decide": decide,
    "fused_qk_norm_rope": fused_qk_norm_rope,
    "temporal_attention_out": temporal_attention,
}

_library = torch.library.Library("adacache_triton", "DEF")
for _name, _launcher in _LAUNCHERS.items():
    _library.define(_name + SCHEMAS[_name])
    _library.impl(_name, _launcher, "CPU" if INTERPRETED else "CUDA")
    torch.library.register_fake(f"adacache_triton::{_name}", FAKE_KERNELS[_name], lib=_library)

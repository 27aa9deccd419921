# SPDX-License-Identifier: Apache-2.0
"""The ops in plain PyTorch: the specification for the tests of the other backends. Sums are float64."""

from .arguments import Meter, Norm
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
from .residual_meter import residual_meter
from .reuse_residual import reuse_residual
from .rms_norm_modulate import rms_norm_modulate
from .stack_residual_meter import stack_residual_meter
from .temporal_attention import temporal_attention

__all__ = [
    "Meter",
    "Norm",
    "decide",
    "extrapolate_residual",
    "extrapolate_residual_meter",
    "fused_qk_norm_rope",
    "gated_residual",
    "gated_residual_meter",
    "gated_residual_norm",
    "gated_residual_norm_float8",
    "gated_residual_norm_meter",
    "layer_norm_modulate",
    "norm_modulate_float8",
    "residual_meter",
    "reuse_residual",
    "rms_norm_modulate",
    "stack_residual_meter",
    "temporal_attention",
]

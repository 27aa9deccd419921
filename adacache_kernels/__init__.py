# SPDX-License-Identifier: Apache-2.0
"""Fused ops for residual caching in video diffusion transformers: they measure how much residuals change,
decide when to compute, and reuse residuals.

Tensors are positional, other arguments keyword-only. N = T*S tokens, frame-major: token n is frame n // S,
place n % S.
"""

from __future__ import annotations

from ._backend import BACKENDS, OPS, BackendChoice, backend_report, use_backend
from ._libraries import build_info
from .columns import METRICS, RULES, initial_state, state_columns, sum_columns
from .ops import (
    decide,
    extrapolate_residual,
    extrapolate_residual_meter,
    fused_qk_norm_rope,
    gated_residual,
    gated_residual_meter,
    gated_residual_norm,
    gated_residual_norm_float8,
    gated_residual_norm_meter,
    layer_norm_modulate,
    norm_modulate_float8,
    residual_meter,
    reuse_residual,
    rms_norm_modulate,
    stack_residual_meter,
    temporal_attention,
)

__all__ = [
    "BACKENDS",
    "METRICS",
    "OPS",
    "RULES",
    "BackendChoice",
    "backend_report",
    "build_info",
    "decide",
    "extrapolate_residual",
    "extrapolate_residual_meter",
    "fused_qk_norm_rope",
    "gated_residual",
    "gated_residual_meter",
    "gated_residual_norm",
    "gated_residual_norm_float8",
    "gated_residual_norm_meter",
    "initial_state",
    "layer_norm_modulate",
    "norm_modulate_float8",
    "residual_meter",
    "reuse_residual",
    "rms_norm_modulate",
    "stack_residual_meter",
    "state_columns",
    "sum_columns",
    "temporal_attention",
    "use_backend",
]

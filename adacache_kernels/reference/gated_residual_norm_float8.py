# SPDX-License-Identifier: Apache-2.0
"""x + gate*y, and the modulated norm of the result in float8."""

from __future__ import annotations

import torch

from .arguments import Norm
from .gated_residual import gated_residual
from .norm_modulate_float8 import norm_modulate_float8


def gated_residual_norm_float8(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    gate_table: torch.Tensor | None,
    norm: Norm,
    x_rows: torch.Tensor | None,
    rounding: int,
    kind: int,
    out: torch.Tensor | None = None,
    norm_out: torch.Tensor | None = None,
    norm_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x_out = gated_residual(x, y, gate, gate_table, x_rows, rounding, out)
    return x_out, *norm_modulate_float8(x_out, norm, None, kind, norm_out, norm_scale)

# SPDX-License-Identifier: Apache-2.0
"""x + gate*y and the modulated norm of the result in float8, in one pass."""

from __future__ import annotations

import torch

from .gated_residual import launch
from .launch import Norm


def gated_residual_norm_float8(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    gate_table: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift_table: torch.Tensor | None,
    scale_table: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    x_rows: torch.Tensor | None,
    rounding: int,
    norm: int,
    out: torch.Tensor,
    norm_out: torch.Tensor,
    norm_scale: torch.Tensor,
) -> None:
    """Launch."""
    modulation = (shift, scale, shift_table, scale_table, weight, bias, eps, norm)
    normed = Norm(norm_out.view(torch.uint8), *modulation, norm_scale)
    launch(x, y, gate, gate_table, x_rows, out, rounding, normed)

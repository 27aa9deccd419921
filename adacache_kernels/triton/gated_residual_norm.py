# SPDX-License-Identifier: Apache-2.0
"""x + gate*y and the modulated norm of the result, in one pass."""

from __future__ import annotations

import torch

from .gated_residual import launch
from .launch import Norm


def gated_residual_norm(
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
) -> None:
    """Launch."""
    normed = Norm(norm_out, shift, scale, shift_table, scale_table, weight, bias, eps, norm)
    launch(x, y, gate, gate_table, x_rows, out, rounding, normed)

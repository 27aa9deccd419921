# SPDX-License-Identifier: Apache-2.0
"""The modulated norm of each token in float8 with one scale per token, in one pass."""

from __future__ import annotations

import torch

from .._choices import ROUNDINGS
from .gated_residual import launch
from .launch import Norm


def norm_modulate_float8(
    x: torch.Tensor,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift_table: torch.Tensor | None,
    scale_table: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    x_rows: torch.Tensor | None,
    norm: int,
    norm_out: torch.Tensor,
    norm_scale: torch.Tensor,
) -> None:
    """Launch."""
    modulation = (shift, scale, shift_table, scale_table, weight, bias, eps, norm)
    normed = Norm(norm_out.view(torch.uint8), *modulation, norm_scale)
    launch(x, None, None, None, x_rows, None, ROUNDINGS["eager"], normed)

# SPDX-License-Identifier: Apache-2.0
"""The modulated RMS norm of each token, in one pass."""

from __future__ import annotations

import torch

from .._choices import NORMS, ROUNDINGS
from .gated_residual import launch
from .launch import Norm


def rms_norm_modulate(
    x: torch.Tensor,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift_table: torch.Tensor | None,
    scale_table: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    x_rows: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Launch."""
    norm = Norm(out, shift, scale, shift_table, scale_table, weight, bias, eps, NORMS["rms"])
    launch(x, None, None, None, x_rows, None, ROUNDINGS["eager"], norm)

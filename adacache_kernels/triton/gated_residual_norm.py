"""x + gate*y and the modulated layer norm of the result, in one pass."""

from __future__ import annotations

import torch

from .gated_residual import launch


def gated_residual_norm(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    x_rows: torch.Tensor | None,
    out: torch.Tensor,
    norm_out: torch.Tensor,
) -> None:
    """Launch."""
    launch(x, y, gate, shift, scale, weight, bias, eps, x_rows, out, norm_out)

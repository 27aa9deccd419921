"""(norm(x) * weight + bias) * (1 + scale) + shift in one pass."""

from __future__ import annotations

import torch

from .gated_residual import launch


def layer_norm_modulate(
    x: torch.Tensor,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    x_rows: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Launch."""
    launch(x, None, None, shift, scale, weight, bias, eps, x_rows, None, out)

"""x + gate*y, and the modulated layer norm of the result."""

from __future__ import annotations

import torch

from .arguments import Norm
from .gated_residual import gated_residual
from .layer_norm_modulate import layer_norm_modulate


def gated_residual_norm(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    norm: Norm,
    x_rows: torch.Tensor | None,
    out: torch.Tensor | None = None,
    norm_out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    x_out = gated_residual(x, y, gate, x_rows, out)
    return x_out, layer_norm_modulate(x_out, norm, None, norm_out)

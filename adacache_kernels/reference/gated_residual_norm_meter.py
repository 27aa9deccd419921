"""`gated_residual_meter`, and the modulated layer norm of x_out."""

from __future__ import annotations

import torch

from .arguments import Meter, Norm
from .gated_residual_meter import gated_residual_meter
from .layer_norm_modulate import layer_norm_modulate


def gated_residual_norm_meter(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    residual: torch.Tensor,
    residual_scale: torch.Tensor | None,
    norm: Norm,
    x_rows: torch.Tensor | None,
    residual_rows: torch.Tensor | None,
    meter: Meter,
    out: torch.Tensor | None = None,
    norm_out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    cache = (residual, residual_scale)
    x_out, sums = gated_residual_meter(x, y, gate, *cache, x_rows, residual_rows, meter, out)
    return x_out, layer_norm_modulate(x_out, norm, None, norm_out), sums

"""`gated_residual_meter`, and the layer norm of x_out, modulated, for the next sub-layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .gated_residual_meter import gated_residual_meter
from .layer_norm_modulate import layer_norm_modulate


def gated_residual_norm_meter(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    residual: torch.Tensor,
    residual_scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    x_rows: torch.Tensor | None,
    residual_rows: torch.Tensor | None,
    video_of_row: torch.Tensor | None,
    num_videos: int,
    frames: int,
    strides: Sequence[int],
    metric: int,
    out: torch.Tensor | None = None,
    norm_out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x_out, sums = gated_residual_meter(
        x,
        y,
        gate,
        residual,
        residual_scale,
        x_rows,
        residual_rows,
        video_of_row,
        num_videos,
        frames,
        strides,
        metric,
        out,
    )
    return x_out, layer_norm_modulate(x_out, shift, scale, weight, bias, eps, None, norm_out), sums

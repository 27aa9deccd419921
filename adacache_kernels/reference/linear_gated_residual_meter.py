"""a @ weight.T + bias, and `gated_residual_meter` of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .gated_residual_meter import gated_residual_meter


def linear_gated_residual_meter(
    a: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    x: torch.Tensor,
    gate: torch.Tensor | None,
    residual: torch.Tensor,
    x_rows: torch.Tensor | None,
    residual_rows: torch.Tensor | None,
    video_of_row: torch.Tensor | None,
    num_videos: int,
    frames: int,
    strides: Sequence[int],
    metric: int,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return gated_residual_meter(
        x,
        torch.nn.functional.linear(a, weight, bias),
        gate,
        residual,
        None,
        x_rows,
        residual_rows,
        video_of_row,
        num_videos,
        frames,
        strides,
        metric,
        out,
    )

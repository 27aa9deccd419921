"""x + gate*y, gate*y written over the old residual, and the sums of the two residuals."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .residual_meter import residual_meter


def gated_residual_meter(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor,
    residual: torch.Tensor,
    video_of_row: torch.Tensor | None,
    num_videos: int,
    frames: int,
    strides: Sequence[int],
    metric: int,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    if gate.shape[1] not in (1, y.shape[1]):
        by_frame = y.unflatten(1, (frames, y.shape[1] // frames))
        new = (gate.unsqueeze(2) * by_frame).flatten(1, 2)
    else:
        new = gate * y
    sums = residual_meter(new, residual, video_of_row, num_videos, frames, strides, metric)
    residual.copy_(new)
    x_out = x + new if out is None else torch.add(x, new, out=out)
    return x_out, sums

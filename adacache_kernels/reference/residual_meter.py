# SPDX-License-Identifier: Apache-2.0
"""The sums of a residual and an old one, and of the motion between frames."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..columns import METRICS
from .arguments import Meter


def residual_meter(
    residual: torch.Tensor,
    old: torch.Tensor,
    meter: Meter,
) -> torch.Tensor:
    video_of_row, num_videos, frames, strides, metric = meter
    columns = 7 + 2 * len(strides)
    # Per row, to limit the memory of float64 copies.
    rows = [_row_sums(residual[row], old[row], frames, strides) for row in range(residual.shape[0])]
    by_row = torch.stack(rows) if rows else residual.new_empty((0, columns), dtype=torch.float64)
    if video_of_row is None:
        sums = by_row.sum(0, keepdim=True)
    else:
        videos = torch.arange(num_videos, dtype=torch.int32, device=residual.device)
        mine = (video_of_row == videos[:, None])[:, :, None]
        sums = torch.where(mine, by_row, 0.0).sum(1)
        outside = ((video_of_row < 0) | (video_of_row >= num_videos)).any()
        sums = torch.where(outside, torch.nan, sums)
    if metric == METRICS["l1"]:
        sums[:, 3:7] = torch.nan
    return sums


def _row_sums(residual: torch.Tensor, old: torch.Tensor, frames: int, strides: Sequence[int]) -> torch.Tensor:
    new, old = residual.double(), old.double()
    diff = new - old
    sums = [diff.abs().sum(), old.abs().sum(), new.abs().sum()]
    sums += [diff.square().sum(), old.square().sum(), new.square().sum(), (new * old).sum()]
    by_frame = new.unflatten(0, (frames, new.shape[0] // frames))
    for stride in strides:
        later, earlier = by_frame[stride:], by_frame[:-stride]
        sums += [(later - earlier).abs().sum(), (later.abs() + earlier.abs()).sum()]
    return torch.stack(sums)

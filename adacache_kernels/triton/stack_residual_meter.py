# SPDX-License-Identifier: Apache-2.0
"""Stores x_out - x_in over the old residual; sums of both residuals. One pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .meter import STACK, meter


def stack_residual_meter(
    x_out: torch.Tensor,
    x_in: torch.Tensor,
    residual: torch.Tensor,
    residual_scale: torch.Tensor | None,
    rows: torch.Tensor | None,
    video_of_row: torch.Tensor | None,
    num_videos: int,
    frames: int,
    strides: Sequence[int],
    metric: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Launch; returns the sums."""
    return meter(
        STACK,
        x_in,
        x_out,
        residual,
        video_of_row,
        num_videos,
        frames,
        strides,
        metric,
        residual_scale=residual_scale,
        x_rows=rows,
        out=out,
    )

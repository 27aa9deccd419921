# SPDX-License-Identifier: Apache-2.0
"""x + gate*y; stores gate*y over the old residual; sums of both residuals. One pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .meter import GATED, meter


def gated_residual_meter(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    gate_table: torch.Tensor | None,
    residual: torch.Tensor,
    residual_scale: torch.Tensor | None,
    x_rows: torch.Tensor | None,
    residual_rows: torch.Tensor | None,
    rounding: int,
    video_of_row: torch.Tensor | None,
    num_videos: int,
    frames: int,
    strides: Sequence[int],
    metric: int,
    out: torch.Tensor,
) -> torch.Tensor:
    """Launch; returns the sums."""
    return meter(
        GATED,
        x,
        y,
        residual,
        video_of_row,
        num_videos,
        frames,
        strides,
        metric,
        gate=gate,
        gate_table=gate_table,
        rounding=rounding,
        residual_scale=residual_scale,
        x_rows=x_rows,
        residual_rows=residual_rows,
        out=out,
    )

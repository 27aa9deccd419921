# SPDX-License-Identifier: Apache-2.0
"""x + gate*y and the modulated norm of the result; stores gate*y over the old residual; sums of both
residuals. One pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .launch import Norm
from .meter import GATED, meter


def gated_residual_norm_meter(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    gate_table: torch.Tensor | None,
    residual: torch.Tensor,
    residual_scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift_table: torch.Tensor | None,
    scale_table: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    x_rows: torch.Tensor | None,
    residual_rows: torch.Tensor | None,
    rounding: int,
    norm: int,
    video_of_row: torch.Tensor | None,
    num_videos: int,
    frames: int,
    strides: Sequence[int],
    metric: int,
    out: torch.Tensor,
    norm_out: torch.Tensor,
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
        norm=Norm(norm_out, shift, scale, shift_table, scale_table, weight, bias, eps, norm),
    )

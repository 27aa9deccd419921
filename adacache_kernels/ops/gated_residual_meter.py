# SPDX-License-Identifier: Apache-2.0
"""x + gate*y; caches the residual gate*y and measures its change in the same pass over memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .._choices import rounding_number
from ..columns import metric_number
from ._dispatch import call


def gated_residual_meter(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    residual: torch.Tensor,
    *,
    gate_table: torch.Tensor | None = None,
    rounding: str = "eager",
    frames: int,
    strides: Sequence[int] = (1,),
    video_of_row: torch.Tensor | None = None,
    num_videos: int = 1,
    metric: str = "l1",
    residual_scale: torch.Tensor | None = None,
    x_rows: torch.Tensor | None = None,
    residual_rows: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a gated sub-layer output to the stream, cache the gated residual, and measure how much it changed.

    x_out is that of `gated_residual`. r = gate*y is rounded to the dtype of x before it is cached and
    measured with both roundings: sums and decisions do not depend on it. With rounding="float32"
    x_out differs from x + r by the rounding of r. Deterministic: equal inputs give bit-identical sums.

    Args:
        x: the stream, float32, bfloat16 or float16 [B, N, C] with N = frames * places, frame-major.
            Contiguous in C, any other strides; this holds for all tensors below, which also have the dtype
            and device of x unless stated otherwise.
        y: the output of the sub-layer [B, N, C].
        gate: [B, 1, C], per frame [B, frames, C] or per token [B, N, C]; in the dtype of x, or in float32. A
            dimension of 1 before C is accepted. Other strides may be 0 (expanded). None: 1.
        residual: [B, N, C], the residual of the last computed step; overwritten with r. In the dtype of x, or
            float8_e4m3fn with `residual_scale`; r is measured before it is rounded to float8.
        gate_table: float32 [1, 1, C], added to the gate in float32; see `gated_residual`.
        rounding: "eager" rounds gate*y to the dtype of x before the addition; "float32" rounds only the sum;
            see `gated_residual`.
        frames: latent frames T; divides N.
        strides: frame distances of the motion term, each in 1..frames-1, at most 8; may be empty.
        video_of_row: int32 [B], the video of each row, 0..num_videos-1. None: all rows are one video.
        num_videos: number of videos, 1 to 65536. Sums are per video.
        metric: "l1", "l2" or "cosine": the distance for `decide`. "l1" skips the squares.
        residual_scale: float32 [B, N], any strides: the cached value is residual_scale * residual. Required
            for float8 residuals only; overwritten with max|r| / 448 per token (1 if that is nearly 0;
            unchanged if C is 0).
        x_rows: int32 [B]; row b of the batch is row x_rows[b] of x, which may have any number of rows.
        residual_rows: int32 [B], distinct; the same for residual and residual_scale.
        out: [B, N, C] for x_out, may be x itself (not with x_rows); None allocates.

    Under autocast y is cast to the dtype of x, and so is a gate that is neither in that dtype nor in float32.

    Returns:
        x_out [B, N, C], and sums float64 [num_videos, columns], columns named by `sum_columns(strides)`. A
        video without rows has sums 0. Non-finite input gives non-finite sums, for which `decide` computes the
        next step.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it. Out-of-range video ids and row
            indices raise on the CPU. On CUDA they are not checked, because that would synchronize: with an
            out-of-range id all sums are NaN; with an out-of-range index the cache is not written, and x_out
            of the row and the sums of its video are NaN.

    Source: AdaCache (arXiv 2411.02397), and `compute_next_step` of the published code.
    """
    gated = (x, y, gate, gate_table)
    meter = (video_of_row, num_videos, frames, strides, metric_number(metric))
    cache = (residual, residual_scale)
    rest = (x_rows, residual_rows, rounding_number(rounding))
    return call("gated_residual_meter", *gated, *cache, *rest, *meter, out=out)

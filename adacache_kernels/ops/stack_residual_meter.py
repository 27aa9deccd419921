# SPDX-License-Identifier: Apache-2.0
"""Caches the residual of a stack of blocks and measures its change, in one pass over memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..columns import metric_number
from ._dispatch import call


def stack_residual_meter(
    x_out: torch.Tensor,
    x_in: torch.Tensor,
    residual: torch.Tensor,
    *,
    frames: int,
    strides: Sequence[int] = (1,),
    video_of_row: torch.Tensor | None = None,
    num_videos: int = 1,
    metric: str = "l1",
    residual_scale: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cache R = x_out - x_in, the residual of a stack of blocks, and measure how much it changed.

    R is bit-identical to eager PyTorch in this dtype; it is rounded before it is measured. A difference that
    overflows float16 makes the sums of its video non-finite; `decide` then computes the next step and sets
    "nonfinite".

    Args:
        x_out: the stream after the blocks, float32, bfloat16 or float16 [B, N, C] with N = frames * places,
            frame-major. Contiguous in C, any other strides; this holds for all tensors below, which also
            have the dtype and device of x_out unless stated otherwise.
        x_in: the stream before the blocks [B, N, C]; with `rows`, any number of rows.
        residual: of the shape of x_in, the residual of the last computed step; overwritten with R. In the
            dtype of x_out, or float8_e4m3fn with `residual_scale`.
        frames: latent frames T; divides N.
        strides: frame distances of the motion term, each in 1..frames-1, at most 8; may be empty.
        video_of_row: int32 [B], the video of each row, 0..num_videos-1. None: all rows are one video.
        num_videos: number of videos, 1 to 65536. Sums are per video.
        metric: "l1", "l2" or "cosine": the distance for `decide`. "l1" skips the squares.
        residual_scale: float32 [rows of residual, N], any strides; required for float8 residuals only; see
            `gated_residual_meter`.
        rows: int32 [B], distinct; row b of x_out is row rows[b] of x_in, residual, residual_scale and out.
        out: of the shape of x_in, may be x_in itself; x_out is copied to it, or scattered to `rows`.

    Returns:
        sums float64 [num_videos, columns], columns named by `sum_columns(strides)`; see
        `gated_residual_meter`.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it. Out-of-range video ids and row
            indices raise on the CPU. On CUDA they are not checked, because that would synchronize: with an
            out-of-range id all sums are NaN; with an out-of-range index nothing is written, and the sums of
            its video are NaN.

    Source: AdaCache (arXiv 2411.02397). All blocks share one schedule, so one tensor keeps the residual of
    the whole stack.
    """
    meter = (video_of_row, num_videos, frames, strides, metric_number(metric))
    cache = (residual, residual_scale)
    results = call("stack_residual_meter", x_out, x_in, *cache, rows, *meter, out=out)
    return results if out is None else results[1]

"""The residual of a whole stack of blocks, cached and measured against the last one in one pass over
memory."""

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
    """Cache R = x_out - x_in, the residual of the blocks between, and measure how much it changed.

    R is bit for bit what eager PyTorch gives in this dtype: it is rounded before it is measured. A difference
    beyond the range of float16 is infinite; it makes the sums of its video non-finite, which `decide` takes
    for "compute" and marks.

    Args:
        x_out: the stream after the blocks, float32, bfloat16 or float16 [B, N, C] with N = frames * places,
            frame-major. Contiguous in C, any other strides; this holds for all tensors below, which also
            share x_out's dtype and device unless stated otherwise.
        x_in: the stream before the blocks [B, N, C], or with `rows` any number of rows.
        residual: of x_in's shape, holds the residual of the last computed step and is overwritten with R. Of
            x_out's dtype, or float8_e4m3fn with `residual_scale`.
        frames: latent frames T; divides N.
        strides: frame distances of the motion term, each in 1..frames-1, at most 8; may be empty.
        video_of_row: int32 [B], the video of each row, 0..num_videos-1. None: all rows are one video.
        num_videos: number of videos with sums of their own, 1 to 65536.
        metric: "l1", "l2" or "cosine": the distance that `decide` will use. "l1" skips the squares.
        residual_scale: float32 [rows of residual, N], any strides; given if and only if residual is float8;
            see `gated_residual_meter`.
        rows: int32 [B], no row twice; row b of x_out is row rows[b] of x_in, residual, residual_scale and
            out.
        out: of x_in's shape, may be x_in itself; x_out is also copied to its rows there.

    Returns:
        sums float64 [num_videos, columns], columns named by `sum_columns(strides)`; see
        `gated_residual_meter`.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it. Video ids and row indices out
            of range raise on the CPU. On CUDA they are not checked, because that would synchronize: a wrong
            id makes all sums NaN; a wrong index writes nothing and makes the sums of its video NaN.

    Source: AdaCache (arXiv 2411.02397); one tensor holds the residuals of a whole stack, since all blocks
    share one schedule.
    """
    meter = (video_of_row, num_videos, frames, strides, metric_number(metric))
    cache = (residual, residual_scale)
    results = call("stack_residual_meter", x_out, x_in, *cache, rows, *meter, out=out)
    return results if out is None else results[1]

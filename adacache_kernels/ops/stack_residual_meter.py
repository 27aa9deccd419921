"""The residual of a whole stack of blocks, kept and metered against the last one in one pass over memory."""

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
    """Keep R = x_out - x_in, the residual of the blocks between, and measure how much it changed.

    R is bit for bit what eager PyTorch gives in this dtype: it is rounded before it is measured.

    Args:
        x_out: the stream after the blocks, float32, bfloat16 or float16 [B, N, C] with N = frames * places,
            frame-major. Contiguous in C, any other strides; this holds for all tensors below, which also
            share x_out's dtype and device where nothing else is said.
        x_in: the stream before the blocks [B, N, C], or with `rows` any number of rows.
        residual: of x_in's shape, holds the residual of the last computed step and is overwritten with R. Of
            x_out's dtype, or float8_e4m3fn with `residual_scale`.
        frames: latent frames T; divides N.
        strides: frame distances of the motion term, each in 1..frames-1, at most 8; may be empty.
        video_of_row: int32 [B], the video in 0..num_videos-1 that each row belongs to. None: all rows are one
            video's.
        num_videos: videos that are measured apart.
        metric: "l1", "l2" or "cosine": the distance that `decide` will take. "l1" leaves out the squares.
        residual_scale: float32 [rows of residual, N], any strides; given if and only if residual is float8;
            see `gated_residual_meter`.
        rows: int32 [B], no row twice: row b of x_out belongs to row rows[b] of x_in, residual, residual_scale
            and out.
        out: of x_in's shape, may be x_in itself: x_out is put there too, into its rows.

    Returns:
        sums float64 [num_videos, columns], columns named by `sum_columns(strides)`; see
        `gated_residual_meter`.

    Raises:
        ValueError: an argument does not fit; the message names it. Values of video_of_row outside
            0..num_videos-1, and rows that there are not, raise on the CPU. On a GPU, where looking would stop
            the stream, the first make all sums NaN; the others write nothing and make the sums of their video
            NaN.

    Source: AdaCache (arXiv 2411.02397); that one tensor can stand for a whole stack's residuals follows from
    all blocks sharing one schedule.
    """
    meter = (video_of_row, num_videos, frames, strides, metric_number(metric))
    cache = (residual, residual_scale)
    results = call("stack_residual_meter", x_out, x_in, *cache, rows, *meter, out=out)
    return results if out is None else results[1]

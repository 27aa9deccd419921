"""x + gate*y, with the residual gate*y kept and metered against the last one in the same pass over memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..columns import metric_number
from ._dispatch import call


def gated_residual_meter(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    residual: torch.Tensor,
    *,
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
    """Add a gated sub-layer output to the stream, keep the gated residual, and measure how much it changed.

    r = gate*y and x_out = x + r are bit for bit what eager PyTorch gives in this dtype: r is rounded to the
    dtype before it is added and before it is measured. Sums are taken in a fixed order: the same input gives
    the same bits.

    Args:
        x: the stream, float32, bfloat16 or float16 [B, N, C] with N = frames * places, frame-major.
            Contiguous in C, any other strides; this holds for all tensors below, which also share x's dtype
            and device where nothing else is said.
        y: the sub-layer's output [B, N, C].
        gate: [B, 1, C], per frame [B, frames, C] or per token [B, N, C]; other strides may be 0 (expanded).
            None: 1.
        residual: [B, N, C], holds the residual of the last computed step and is overwritten with r. Of x's
            dtype, or float8_e4m3fn with `residual_scale`; r itself is measured before it is rounded to
            float8.
        frames: latent frames T; divides N.
        strides: frame distances of the motion term, each in 1..frames-1, at most 8; may be empty.
        video_of_row: int32 [B], the video in 0..num_videos-1 that each row belongs to. None: all rows are one
            video's.
        num_videos: videos that are measured apart.
        metric: "l1", "l2" or "cosine": the distance that `decide` will take. "l1" leaves out the squares.
        residual_scale: float32 [B, N], any strides: the kept value is residual_scale * residual. Given if and
            only if residual is float8; overwritten with max|r| / 448 of each token (1 where that is nearly
            0; unchanged if C is 0).
        x_rows: int32 [B]: x has any number of rows, and row b of the batch is row x_rows[b] of x.
        residual_rows: int32 [B], no row twice: the same for residual and residual_scale.
        out: [B, N, C] for x_out, may be x itself (not with x_rows); None allocates.

    Under autocast y and gate of another floating dtype are cast to x's dtype.

    Returns:
        x_out [B, N, C], and sums float64 [num_videos, columns], columns named by `sum_columns(strides)`. A
        video without rows has sums 0. Non-finite input gives non-finite sums, which `decide` takes for
        "compute".

    Raises:
        ValueError: an argument does not fit; the message names it. Values of video_of_row outside
            0..num_videos-1, and rows that there are not, raise on the CPU. On a GPU, where looking would stop
            the stream, the first make all sums NaN; the others write nothing, and make x_out of their row
            and the sums of its video NaN.

    Source: AdaCache (arXiv 2411.02397), and `compute_next_step` of the published code.
    """
    meter = (video_of_row, num_videos, frames, strides, metric_number(metric))
    cache = (residual, residual_scale)
    return call("gated_residual_meter", x, y, gate, *cache, x_rows, residual_rows, *meter, out=out)

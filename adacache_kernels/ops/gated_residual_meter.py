"""x + gate*y; the residual gate*y is cached and measured against the last one in the same pass over
memory."""

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
    """Add a gated sub-layer output to the stream, cache the gated residual, and measure how much it changed.

    r = gate*y and x_out = x + r are bit for bit what eager PyTorch gives in this dtype: r is rounded to the
    dtype before it is added and before it is measured. Deterministic: equal inputs give bit-identical sums.

    Args:
        x: the stream, float32, bfloat16 or float16 [B, N, C] with N = frames * places, frame-major.
            Contiguous in C, any other strides; this holds for all tensors below, which also share x's dtype
            and device unless stated otherwise.
        y: the sub-layer's output [B, N, C].
        gate: [B, 1, C], per frame [B, frames, C] or per token [B, N, C]; other strides may be 0 (expanded).
            None: 1.
        residual: [B, N, C], holds the residual of the last computed step and is overwritten with r. Of x's
            dtype, or float8_e4m3fn with `residual_scale`; r itself is measured before it is rounded to
            float8.
        frames: latent frames T; divides N.
        strides: frame distances of the motion term, each in 1..frames-1, at most 8; may be empty.
        video_of_row: int32 [B], the video of each row, 0..num_videos-1. None: all rows are one video.
        num_videos: number of videos with sums of their own, 1 to 65536.
        metric: "l1", "l2" or "cosine": the distance that `decide` will use. "l1" skips the squares.
        residual_scale: float32 [B, N], any strides: the cached value is residual_scale * residual. Given if
            and only if residual is float8; overwritten with max|r| / 448 of each token (1 where that is
            nearly 0; unchanged if C is 0).
        x_rows: int32 [B]; row b of the batch is row x_rows[b] of x, which may have any number of rows.
        residual_rows: int32 [B], no row twice; the same for residual and residual_scale.
        out: [B, N, C] for x_out, may be x itself (not with x_rows); None allocates.

    Under autocast y and gate of another floating dtype are cast to x's dtype.

    Returns:
        x_out [B, N, C], and sums float64 [num_videos, columns], columns named by `sum_columns(strides)`. A
        video without rows has sums 0. Non-finite input gives non-finite sums, which `decide` takes for
        "compute".

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it. Video ids and row indices out
            of range raise on the CPU. On CUDA they are not checked, because that would synchronize: a wrong
            id makes all sums NaN; a wrong index writes nothing to the cache and makes x_out of its row and
            the sums of its video NaN.

    Source: AdaCache (arXiv 2411.02397), and `compute_next_step` of the published code.
    """
    meter = (video_of_row, num_videos, frames, strides, metric_number(metric))
    cache = (residual, residual_scale)
    return call("gated_residual_meter", x, y, gate, *cache, x_rows, residual_rows, *meter, out=out)

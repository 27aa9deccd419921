"""x + residual for the videos that reuse, the others untouched: all that is left of a reused step."""

from __future__ import annotations

import torch

from ._dispatch import call


def reuse_residual(
    x: torch.Tensor,
    residual: torch.Tensor,
    *,
    video_of_row: torch.Tensor | None = None,
    reuse: torch.Tensor | None = None,
    residual_scale: torch.Tensor | None = None,
    x_rows: torch.Tensor | None = None,
    residual_rows: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Add a cached residual to the rows whose video reuses it, and copy the other rows.

    The sum is taken in float32 and rounded once to x's dtype, as eager PyTorch does for x + residual of one
    dtype.

    Args:
        x: the stream, float32, bfloat16 or float16 [B, N, C]. Contiguous in C, any other strides.
        residual: [B, N, C] on the same device, float32, bfloat16 or float16 whatever x's dtype, or
            float8_e4m3fn with `residual_scale`. Contiguous in C.
        video_of_row: int32 [B], the video that each row belongs to.
        reuse: bool [num_videos] on x's device, which videos reuse; None: all. Without video_of_row it holds
            one entry for all rows, or B entries (row b is video b).
        residual_scale: float32 [B, N], any strides: what is added is residual_scale * residual. Given if and
            only if residual is float8.
        x_rows: int32 [B]: x has any number of rows, and row b of the batch is row x_rows[b] of x.
        residual_rows: int32 [B]: the same for residual and residual_scale.
        out: [B, N, C] for the result, may be x itself (not with x_rows); None allocates.

    Returns:
        x_out [B, N, C].

    Raises:
        ValueError: an argument does not fit; the message names it. Rows and videos that there are not raise
            on the CPU; on a GPU, where looking would stop the stream, their rows are filled with NaN.

    Source: AdaCache (arXiv 2411.02397); that one tensor can stand for a whole stack's residuals follows from
    all blocks sharing one schedule.
    """
    cache, rows = (residual, residual_scale), (x_rows, residual_rows)
    return call("reuse_residual", x, *cache, *rows, video_of_row, reuse, out=out)

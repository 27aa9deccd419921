# SPDX-License-Identifier: Apache-2.0
"""x + residual for the videos that reuse, x for the others: the only op of a reused step."""

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
    """Add a cached residual to the rows of videos that reuse, and copy the other rows.

    The sum is computed in float32 and rounded once to the dtype of x. Bit-identical to x + residual in eager
    PyTorch if both have the same dtype.

    Args:
        x: the stream, float32, bfloat16 or float16 [B, N, C]. Contiguous in C, any other strides.
        residual: [B, N, C] on the same device, float32, bfloat16 or float16 independent of the dtype of x, or
            float8_e4m3fn with `residual_scale`. Contiguous in C.
        video_of_row: int32 [B], the video of each row.
        reuse: bool [num_videos] on the device of x, the videos that reuse; None: all. Without video_of_row it
            has one entry for all rows, or B entries (row b is video b).
        residual_scale: float32 [B, N], any strides: the op adds residual_scale * residual. Required for
            float8 residuals only.
        x_rows: int32 [B]; row b of the batch is row x_rows[b] of x, which may have any number of rows.
        residual_rows: int32 [B]; the same for residual and residual_scale.
        out: [B, N, C] for the result, may be x itself (not with x_rows); None allocates.

    Returns:
        x_out [B, N, C].

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it. Out-of-range row indices and
            video ids raise on the CPU. On CUDA they are not checked, because that would synchronize; their
            rows are NaN.

    Source: AdaCache (arXiv 2411.02397). All blocks share one schedule, so one tensor keeps the residual of
    the whole stack.
    """
    cache, rows = (residual, residual_scale), (x_rows, residual_rows)
    return call("reuse_residual", x, *cache, *rows, video_of_row, reuse, out=out)

# SPDX-License-Identifier: Apache-2.0
"""x + sum of c_i * F_i: adds a residual forecast from cached factors to the stream in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ._dispatch import call


def extrapolate_residual(
    x: torch.Tensor,
    factors: Sequence[torch.Tensor],
    coefficients: torch.Tensor,
    *,
    video_of_row: torch.Tensor | None = None,
    x_rows: torch.Tensor | None = None,
    residual_rows: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Add a residual forecast c_0*F_0 + c_1*F_1 + ... to the stream, with coefficients per video.

    Computed in float32 from left to right; x is added last, and the result is rounded once to the dtype of x.

    Args:
        x: the stream, float32, bfloat16 or float16 [B, N, C]. Contiguous in C, any other strides.
        factors: 1 to 4 tensors [B, N, C] on the same device, all float32, bfloat16 or float16, independent of
            the dtype of x; contiguous in C. F_0 is the cached residual, F_i its i-th difference.
        coefficients: float32 [num_videos, factors], contiguous. Without video_of_row it has one row for all
            rows, or B rows (row b is video b).
        video_of_row: int32 [B], the video of each row.
        x_rows: int32 [B]; row b of the batch is row x_rows[b] of x, which may have any number of rows.
        residual_rows: int32 [B]; the same for the factors.
        out: [B, N, C] for the result, may be x itself (not with x_rows); None allocates.

    Returns:
        x_out [B, N, C].

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it. Out-of-range row indices and
            video ids raise on the CPU. On CUDA they are not checked, because that would synchronize; their
            rows are NaN.

    Source: TaylorSeer (arXiv 2503.06923), equation of the Taylor forecast of features.
    """
    factors = list(factors) if isinstance(factors, Sequence) else factors
    rows = (x_rows, residual_rows)
    return call("extrapolate_residual", x, factors, coefficients, *rows, video_of_row, out=out)

# SPDX-License-Identifier: Apache-2.0
"""`extrapolate_residual`, and in the same pass the difference of the forecast from a second one or from a
computed residual."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..columns import metric_number
from ._dispatch import call


def extrapolate_residual_meter(
    x: torch.Tensor,
    factors: Sequence[torch.Tensor],
    coefficients: torch.Tensor,
    *,
    frames: int,
    other_coefficients: torch.Tensor | None = None,
    computed: torch.Tensor | None = None,
    strides: Sequence[int] = (1,),
    video_of_row: torch.Tensor | None = None,
    num_videos: int = 1,
    metric: str = "l1",
    x_rows: torch.Tensor | None = None,
    residual_rows: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a residual forecast to the stream, and measure it against a second forecast or a computed residual.

    x_out is bit-identical to that of `extrapolate_residual`. The forecasts c_0*F_0 + c_1*F_1 + ... are
    measured in float32, before they are rounded. Deterministic: sums have a fixed order.

    Args:
        x: the stream, float32, bfloat16 or float16 [B, N, C] with N = frames * places, frame-major.
            Contiguous in C, any other strides.
        factors: 1 to 4 tensors [B, N, C] on the same device, all float32, bfloat16 or float16, independent of
            the dtype of x; contiguous in C. F_0 is the cached residual, F_i its i-th difference.
        coefficients: float32 [num_videos, factors], contiguous.
        frames: latent frames T; divides N.
        other_coefficients: float32 [num_videos, factors], of the second forecast from the same factors.
            Expected unless `computed` is given.
        computed: a computed residual [B, N, C] in the dtype of x, not indexed. Expected unless
            `other_coefficients` is given.
        strides: frame distances of the motion term of the forecast, each in 1..frames-1, at most 8; may be
            empty, which costs least.
        video_of_row: int32 [B], the video of each row, 0..num_videos-1. None: all rows are one video.
        num_videos: number of videos, 1 to 65536. Coefficients and sums are per video.
        metric: "l1", "l2" or "cosine": the distance for `decide`. "l1" skips the squares.
        x_rows: int32 [B]; row b of the batch is row x_rows[b] of x, which may have any number of rows.
        residual_rows: int32 [B]; the same for the factors.
        out: [B, N, C] for the result, may be x itself (not with x_rows); None allocates.

    Returns:
        x_out [B, N, C], and sums float64 [num_videos, columns], columns named by `sum_columns(strides)`: r is
        the forecast, and old the second forecast or the computed residual.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it. Out-of-range row indices and
            video ids raise on the CPU. On CUDA they are not checked, because that would synchronize; their
            rows are NaN, and so are the sums of their videos (of all videos for an out-of-range video id).

    Source: TaylorSeer (arXiv 2503.06923) for the forecast; the columns of AdaCache (arXiv 2411.02397).
    """
    factors = list(factors) if isinstance(factors, Sequence) else factors
    compared, rows = (other_coefficients, computed), (x_rows, residual_rows)
    meter = (video_of_row, num_videos, frames, strides, metric_number(metric))
    return call("extrapolate_residual_meter", x, factors, coefficients, *compared, *rows, *meter, out=out)

# SPDX-License-Identifier: Apache-2.0
"""The sums of a given residual and a given old one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..columns import metric_number
from ._dispatch import call


def residual_meter(
    residual: torch.Tensor,
    old: torch.Tensor,
    *,
    frames: int,
    strides: Sequence[int] = (1,),
    video_of_row: torch.Tensor | None = None,
    num_videos: int = 1,
    metric: str = "l1",
) -> torch.Tensor:
    """Measure the change of a residual against the old one, and its motion between frames.

    Args:
        residual: the new residual, float32, bfloat16 or float16 [B, N, C] with N = frames * places,
            frame-major. Contiguous in C, any other strides.
        old: the residual of the last computed step, of the same shape, dtype and device.
        frames: latent frames T; divides N.
        strides: frame distances of the motion term, each in 1..frames-1, at most 8; may be empty.
        video_of_row: int32 [B], the video of each row, 0..num_videos-1. None: all rows are one video.
        num_videos: number of videos, 1 to 65536. Sums are per video.
        metric: "l1", "l2" or "cosine": the distance for `decide`. "l1" skips the squares.

    Returns:
        sums float64 [num_videos, columns], columns named by `sum_columns(strides)`; see
        `gated_residual_meter`.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.

    Source: AdaCache (arXiv 2411.02397), and `compute_next_step` of the published code.
    """
    meter = (video_of_row, num_videos, frames, strides, metric_number(metric))
    return call("residual_meter", residual, old, *meter)

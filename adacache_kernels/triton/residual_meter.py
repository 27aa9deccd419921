# SPDX-License-Identifier: Apache-2.0
"""The sums of two given residuals, in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .meter import PAIR, meter


def residual_meter(
    residual: torch.Tensor,
    old: torch.Tensor,
    video_of_row: torch.Tensor | None,
    num_videos: int,
    frames: int,
    strides: Sequence[int],
    metric: int,
) -> torch.Tensor:
    """Launch; returns the sums."""
    return meter(PAIR, None, residual, old, video_of_row, num_videos, frames, strides, metric)

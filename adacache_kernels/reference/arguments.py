# SPDX-License-Identifier: Apache-2.0
"""Groups of arguments shared by several ops, in the order of the schemas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Meter(NamedTuple):
    video_of_row: torch.Tensor | None
    num_videos: int
    frames: int
    strides: Sequence[int]
    metric: int


class Norm(NamedTuple):
    shift: torch.Tensor | None
    scale: torch.Tensor | None
    shift_table: torch.Tensor | None
    scale_table: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float

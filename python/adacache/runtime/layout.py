# SPDX-License-Identifier: Apache-2.0
"""Layouts of tokens in the blocks of a model, and the frame-major [B, N, C] that residuals are kept in."""

from __future__ import annotations

from torch import Tensor


def to_video(x: Tensor, layout: str, batch: int) -> Tensor:
    """Tokens of a block's layout as [B, N, C], frame-major."""
    if layout == "video" or x.ndim != 3:
        return x
    if layout == "tokens first":
        return x.transpose(0, 1)
    rows = x.unflatten(0, (batch, -1))
    return (rows if layout == "spatial" else rows.transpose(1, 2)).flatten(1, 2)


def from_video(x: Tensor, layout: str, frames: int) -> Tensor:
    """Tokens [B, N, C], frame-major, in a block's layout."""
    if layout == "video" or x.ndim != 3:
        return x
    if layout == "tokens first":
        return x.transpose(0, 1).contiguous()
    grid = x.unflatten(1, (frames, -1))
    return (grid if layout == "spatial" else grid.transpose(1, 2)).flatten(0, 1)


def to_measure(x: Tensor, layout: str, batch: int) -> Tensor:
    """Tokens as the meter takes them: frame-major, the rows of a video together. [B*S, T, C] stays as it
    is."""
    return x if layout == "temporal" else to_video(x, layout, batch)

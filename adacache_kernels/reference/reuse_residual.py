# SPDX-License-Identifier: Apache-2.0
"""x + residual for the rows of videos that reuse, x for the others."""

from __future__ import annotations

import torch

from .tokens import known_rows, load_cache, pick_rows


def reuse_residual(
    x: torch.Tensor,
    residual: torch.Tensor,
    residual_scale: torch.Tensor | None,
    x_rows: torch.Tensor | None,
    residual_rows: torch.Tensor | None,
    video_of_row: torch.Tensor | None,
    reuse: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    x = pick_rows(x, x_rows)
    kept = load_cache(residual, residual_scale, residual_rows)
    x_out = (x.float() + kept.float()).to(x.dtype)
    if reuse is not None:
        row_reuses = reuse.expand(x.shape[0]) if video_of_row is None else pick_rows(reuse, video_of_row) != 0
        x_out = torch.where(row_reuses[:, None, None], x_out, x)
        if video_of_row is not None:
            known = known_rows(video_of_row, reuse.shape[0])
            x_out = torch.where(known[:, None, None], x_out, torch.nan)
    return x_out if out is None else out.copy_(x_out)

"""x + residual for the rows whose video reuses, x for the others."""

from __future__ import annotations

import torch


def reuse_residual(
    x: torch.Tensor,
    residual: torch.Tensor,
    video_of_row: torch.Tensor | None,
    reuse: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    x_out = (x.float() + residual.float()).to(x.dtype)
    if reuse is not None:
        if video_of_row is None:
            row_reuses = reuse.expand(x.shape[0])
        else:
            videos = torch.arange(reuse.shape[0], dtype=torch.int32, device=x.device)
            row_reuses = ((video_of_row[:, None] == videos) & reuse).any(1)
        x_out = torch.where(row_reuses[:, None, None], x_out, x)
    return x_out if out is None else out.copy_(x_out)

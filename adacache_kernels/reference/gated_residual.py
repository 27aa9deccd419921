"""x + gate*y."""

from __future__ import annotations

import torch

from .tokens import gated, pick_rows


def gated_residual(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    x_rows: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    return torch.add(pick_rows(x, x_rows), gated(y, gate), out=out)

# SPDX-License-Identifier: Apache-2.0
"""Stores x_out - x_in over the old residual of a stack of blocks; sums of both residuals."""

from __future__ import annotations

import torch

from .arguments import Meter
from .residual_meter import residual_meter
from .tokens import load_cache, pick_rows, store_cache, store_rows


def stack_residual_meter(
    x_out: torch.Tensor,
    x_in: torch.Tensor,
    residual: torch.Tensor,
    residual_scale: torch.Tensor | None,
    rows: torch.Tensor | None,
    meter: Meter,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor] | torch.Tensor:
    new = x_out - pick_rows(x_in, rows)
    old = load_cache(residual, residual_scale, rows)
    sums = residual_meter(new, old, meter)
    store_cache(residual, residual_scale, rows, new)
    if out is None:
        return sums
    store_rows(out, rows, x_out)
    return out, sums

# SPDX-License-Identifier: Apache-2.0
"""x + gate*y; stores gate*y over the old residual; sums of both residuals."""

from __future__ import annotations

import torch

from .arguments import Meter
from .residual_meter import residual_meter
from .tokens import added, gated, kept_rows, load_cache, of_known, pick_rows, store_cache


def gated_residual_meter(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    gate_table: torch.Tensor | None,
    residual: torch.Tensor,
    residual_scale: torch.Tensor | None,
    x_rows: torch.Tensor | None,
    residual_rows: torch.Tensor | None,
    rounding: int,
    meter: Meter,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    residual_rows = kept_rows(residual_rows, x_rows, x)
    product = of_known(gated(y, gate, gate_table), residual_rows, residual.shape[0])
    new = product.to(x.dtype)
    old = load_cache(residual, residual_scale, residual_rows)
    sums = residual_meter(new, old, meter)
    store_cache(residual, residual_scale, residual_rows, new)
    result = added(pick_rows(x, x_rows), product, rounding)
    return result if out is None else out.copy_(result), sums

# SPDX-License-Identifier: Apache-2.0
"""x + gate*y."""

from __future__ import annotations

import torch

from .tokens import added, gated, pick_rows


def gated_residual(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    gate_table: torch.Tensor | None,
    x_rows: torch.Tensor | None,
    rounding: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    result = added(pick_rows(x, x_rows), gated(y, gate, gate_table), rounding)
    return result if out is None else out.copy_(result)

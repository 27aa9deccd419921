# SPDX-License-Identifier: Apache-2.0
"""`gated_residual_meter`, and the modulated norm of x_out."""

from __future__ import annotations

import torch

from .arguments import Meter, Norm
from .gated_residual_meter import gated_residual_meter
from .norm_modulate import norm_modulate


def gated_residual_norm_meter(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    gate_table: torch.Tensor | None,
    residual: torch.Tensor,
    residual_scale: torch.Tensor | None,
    norm: Norm,
    x_rows: torch.Tensor | None,
    residual_rows: torch.Tensor | None,
    rounding: int,
    kind: int,
    meter: Meter,
    out: torch.Tensor | None = None,
    norm_out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    arguments = (x, y, gate, gate_table, residual, residual_scale, x_rows, residual_rows, rounding, meter)
    x_out, sums = gated_residual_meter(*arguments, out)
    return x_out, norm_modulate(x_out, norm, kind, None, norm_out), sums

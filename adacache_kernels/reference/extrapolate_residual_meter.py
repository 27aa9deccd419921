# SPDX-License-Identifier: Apache-2.0
"""x + sum of c_i * F_i; sums of this forecast and a second one, or a computed residual."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .arguments import Meter
from .extrapolate_residual import forecast
from .residual_meter import residual_meter
from .tokens import of_known, pick_rows


def extrapolate_residual_meter(
    x: torch.Tensor,
    factors: Sequence[torch.Tensor],
    coefficients: torch.Tensor,
    other_coefficients: torch.Tensor | None,
    computed: torch.Tensor | None,
    x_rows: torch.Tensor | None,
    residual_rows: torch.Tensor | None,
    meter: Meter,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    video_of_row = meter.video_of_row
    new = forecast(factors, coefficients, residual_rows, video_of_row)
    if computed is not None:
        old = computed.float()
    else:
        assert other_coefficients is not None
        old = forecast(factors, other_coefficients, residual_rows, video_of_row)
    x_out = (pick_rows(x, x_rows).float() + new).to(x.dtype)
    # A row with an out-of-range index has no sums.
    for rows, total in ((x_rows, x.shape[0]), (residual_rows, factors[0].shape[0])):
        new, old = of_known(new, rows, total), of_known(old, rows, total)
    sums = residual_meter(new, old, meter)
    return (x_out if out is None else out.copy_(x_out)), sums

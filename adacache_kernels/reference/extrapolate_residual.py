# SPDX-License-Identifier: Apache-2.0
"""x + sum of c_i * F_i, with coefficients per video."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .tokens import pick_rows


def extrapolate_residual(
    x: torch.Tensor,
    factors: Sequence[torch.Tensor],
    coefficients: torch.Tensor,
    x_rows: torch.Tensor | None,
    residual_rows: torch.Tensor | None,
    video_of_row: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    change = forecast(factors, coefficients, residual_rows, video_of_row)
    x_out = (pick_rows(x, x_rows).float() + change).to(x.dtype)
    return x_out if out is None else out.copy_(x_out)


def forecast(
    factors: Sequence[torch.Tensor],
    coefficients: torch.Tensor,
    residual_rows: torch.Tensor | None,
    video_of_row: torch.Tensor | None,
) -> torch.Tensor:
    """The forecast of each row of the batch in float32."""
    by_row = pick_rows(coefficients, video_of_row)[:, :, None, None]
    terms = [
        by_row[:, index] * pick_rows(factor, residual_rows).float() for index, factor in enumerate(factors)
    ]
    change = terms[0]
    for term in terms[1:]:
        change = change + term
    return change

# SPDX-License-Identifier: Apache-2.0
"""The modulated norms of each token: norm(x) * (1 + scale) + shift."""

from __future__ import annotations

import torch

from .._choices import NORMS
from .arguments import Norm
from .tokens import modulator, pick_rows


def norm_modulate(
    x: torch.Tensor,
    norm: Norm,
    kind: int,
    x_rows: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    result = modulated_norm(x, norm, kind, x_rows).to(x.dtype)
    return result if out is None else out.copy_(result)


def modulated_norm(x: torch.Tensor, norm: Norm, kind: int, x_rows: torch.Tensor | None) -> torch.Tensor:
    """In float32, not rounded to the dtype of x."""
    values = pick_rows(x, x_rows).float()
    if kind == NORMS["layer"]:
        values = values - values.mean(-1, keepdim=True)
    normed = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + norm.eps)
    if norm.weight is not None:
        normed = normed * norm.weight.float()
    if norm.bias is not None:
        normed = normed + norm.bias.float()
    if norm.scale is not None:
        normed = normed * (1 + modulator(norm.scale, norm.scale_table, x.shape[1]))
    if norm.shift is not None:
        normed = normed + modulator(norm.shift, norm.shift_table, x.shape[1])
    return normed

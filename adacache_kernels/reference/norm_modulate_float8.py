# SPDX-License-Identifier: Apache-2.0
"""The modulated norm of each token in float8, with one scale per token."""

from __future__ import annotations

import torch

from .arguments import Norm
from .norm_modulate import modulated_norm
from .tokens import quantized


def norm_modulate_float8(
    x: torch.Tensor,
    norm: Norm,
    x_rows: torch.Tensor | None,
    kind: int,
    norm_out: torch.Tensor | None = None,
    norm_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    normed = modulated_norm(x, norm, kind, x_rows)
    if norm_out is None or norm_scale is None:
        norm_out = torch.empty_like(normed, dtype=torch.float8_e4m3fn)
        norm_scale = normed.new_empty((*normed.shape[:2], 1))
    if normed.shape[2]:  # without channels the scale is undefined
        stored, scale = quantized(normed)
        norm_out.copy_(stored)
        norm_scale.copy_(scale[:, :, None])
    return norm_out, norm_scale

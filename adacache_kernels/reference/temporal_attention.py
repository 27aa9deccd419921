# SPDX-License-Identifier: Apache-2.0
"""Attention over the frames of each place, in float32, rounded once."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from .heads import norm_and_rope


def temporal_attention(
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    interleaved: bool,
    frames: int,
    eps: float,
    scale: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    rows, tokens, _, heads, dim = qkv.shape
    q = norm_and_rope(qkv[:, :, 0], q_weight, cos, sin, interleaved, eps)
    k = norm_and_rope(qkv[:, :, 1], k_weight, cos, sin, interleaved, eps)
    # [B, places, heads, frames, dim]
    by_place = (rows, frames, tokens // frames, heads, dim)
    q, k, v = (x.reshape(by_place).permute(0, 2, 3, 1, 4) for x in (q, k, qkv[:, :, 2].float()))
    device = qkv.device.type
    # Autocast would round the matrix products to its dtype.
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if autocast else nullcontext():
        y = torch.softmax(q @ k.transpose(-1, -2) * scale, -1) @ v
    result = y.permute(0, 3, 1, 2, 4).reshape(rows, tokens, heads * dim).to(qkv.dtype)
    return result if out is None else out.copy_(result)

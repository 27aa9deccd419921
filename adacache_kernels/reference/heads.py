# SPDX-License-Identifier: Apache-2.0
"""Shared by the attention ops: norm and rotation of q and k, in float32."""

from __future__ import annotations

import torch


def norm_and_rope(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    interleaved: bool,
    eps: float,
) -> torch.Tensor:
    """RMS norm over the last dimension of x [B, N, heads, dim], then rotation. Returns float32."""
    x = x.float()
    if weight is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()
    if cos is None or sin is None or x.shape[-1] == 0:
        return x
    pairs = x.unflatten(-1, (-1, 2) if interleaved else (2, -1))
    axis = -1 if interleaved else -2
    a, b = pairs.unbind(axis)
    c, s = by_token(cos, x.shape[1]), by_token(sin, x.shape[1])
    return torch.stack((a * c - b * s, a * s + b * c), axis).flatten(-2)


def by_token(angles: torch.Tensor, tokens: int) -> torch.Tensor:
    """Repeat rows of [L, dim / 2] to [N, 1, dim / 2], for N / L consecutive tokens each."""
    if angles.shape[0] != tokens:
        angles = angles.repeat_interleave(tokens // angles.shape[0], 0)
    return angles[:, None]

# SPDX-License-Identifier: Apache-2.0
"""Gates and modulation in plain PyTorch."""

from __future__ import annotations

from torch import Tensor


def gated(y: Tensor, gate: Tensor) -> Tensor:
    """gate * y for y [B, T*S, C] and gate [B, 1|T, C]."""
    if gate.shape[1] == 1:
        return gate * y
    return (gate[:, :, None] * y.unflatten(1, (gate.shape[1], -1))).flatten(1, 2)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift for x [B, T*S, C] and shift, scale [B, 1|T, C]."""
    if shift.shape[1] == 1:
        return x * (1 + scale) + shift
    frames = x.unflatten(1, (shift.shape[1], -1))
    return (frames * (1 + scale[:, :, None]) + shift[:, :, None]).flatten(1, 2)

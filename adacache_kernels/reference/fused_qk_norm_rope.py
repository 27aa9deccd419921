# SPDX-License-Identifier: Apache-2.0
"""RMS norm and rotary embedding of queries and keys, in place."""

from __future__ import annotations

import torch

from .heads import norm_and_rope


def fused_qk_norm_rope(
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    interleaved: bool,
    eps: float,
) -> None:
    for index, weight in enumerate((q_weight, k_weight)):
        qkv[:, :, index] = norm_and_rope(qkv[:, :, index], weight, cos, sin, interleaved, eps).to(qkv.dtype)

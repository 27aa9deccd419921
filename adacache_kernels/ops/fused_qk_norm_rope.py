# SPDX-License-Identifier: Apache-2.0
"""RMS norm and rotary embedding of queries and keys, in place in the output of the fused projection."""

from __future__ import annotations

import torch

from .._checks import require_bool
from ._dispatch import call


def fused_qk_norm_rope(
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    *,
    interleaved: bool = True,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Apply RMS norm and rotary embedding to each head of the queries and keys, in place.

    q = q * rsqrt(mean(q^2) + eps) * q_weight over dim, then channel pairs (a, b) become
    (a cos - b sin, a sin + b cos); the same for k. Computed in float32 and rounded once to the dtype of qkv;
    eager PyTorch rounds after each step. The values (v) do not change.

    Args:
        qkv: float32, bfloat16 or float16 [B, N, 3, heads, dim]: queries, keys and values, the output of a
            linear layer with 3 * heads * dim features; updated in place. Contiguous in its last three
            dimensions, any other strides; dim at most 256, and even with angles.
        q_weight, k_weight: [dim] of the dtype and device of qkv. Both None: no norm.
        cos, sin: float32 [L, dim / 2], contiguous, with L = N (one row per token) or a divisor of N: token n
            uses row n // (N / L), which for L = T frames is its frame. Both None: no rotation.
        interleaved: pairs are channels (2i, 2i + 1); False: (i, i + dim / 2).
        eps: added to the mean square.

    Under autocast q_weight and k_weight of another floating dtype are cast to the dtype of qkv.

    Returns:
        qkv.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.

    Source: rotary embedding (arXiv 2104.09864) after query-key norm (arXiv 2010.04245), as in Open-Sora 1.2.
    """
    require_bool("interleaved", interleaved)
    call("fused_qk_norm_rope", qkv, q_weight, k_weight, cos, sin, interleaved, eps)
    return qkv

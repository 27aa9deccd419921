# SPDX-License-Identifier: Apache-2.0
"""Attention over the frames of each place, directly on the layout of the projection output, without
transposed copies."""

from __future__ import annotations

import torch

from .._checks import require_bool, require_tensor
from ._dispatch import call


def temporal_attention(
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    *,
    frames: int,
    interleaved: bool = True,
    eps: float = 1e-6,
    scale: float | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute temporal attention: a token attends to all frames of its place, per row and head.

    softmax(scale * q k^T) v, with norm and rotation of q and k as in `fused_qk_norm_rope`. Norm, rotation and
    softmax are float32; on a GPU q, k and the softmax weights are rounded to the dtype of qkv before the
    matrix products. The result is rounded once.

    Args:
        qkv: float32, bfloat16 or float16 [B, N, 3, heads, dim] with N = frames * places, frame-major:
            queries, keys and values, the output of a linear layer with 3 * heads * dim features. Contiguous
            in its last three dimensions, any other strides; dim at most 256, and even with angles.
        q_weight, k_weight: [dim] of the dtype and device of qkv. Both None: no norm.
        cos, sin: float32 [frames, dim / 2], or [N, dim / 2] with one row per token; contiguous. Both None: no
            rotation.
        frames: latent frames T, 1 to 64; divides N.
        interleaved: pairs are channels (2i, 2i + 1); False: (i, i + dim / 2).
        eps: added to the mean square.
        scale: factor of the scores before the softmax; None: dim ** -0.5.
        out: [B, N, heads * dim] for the result, contiguous in its last dimension; None allocates.

    Under autocast q_weight and k_weight of another floating dtype are cast to the dtype of qkv.

    Returns:
        [B, N, heads * dim] in the dtype of qkv.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.

    Source: the temporal attention of Latte (arXiv 2401.03048) and Open-Sora 1.2.
    """
    require_tensor("qkv", qkv)
    require_bool("interleaved", interleaved)
    if scale is None:
        scale = qkv.shape[-1] ** -0.5 if qkv.dim() and qkv.shape[-1] else 1.0
    heads = (q_weight, k_weight, cos, sin, interleaved)
    return call("temporal_attention", qkv, *heads, frames, eps, scale, out=out)

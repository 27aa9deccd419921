"""x + gate*y and the modulated layer norm of the next sub-layer, in one pass over memory."""

from __future__ import annotations

import torch

from ._dispatch import call


def gated_residual_norm(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    *,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    x_rows: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    norm_out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a gated sub-layer output to the stream, and compute the modulated layer norm of the result.

    x_out is that of `gated_residual`; the second result is `layer_norm_modulate` of the rounded x_out.

    Args:
        x: the stream, float32, bfloat16 or float16 [B, N, C]. Contiguous in C, any other strides; this holds
            for all tensors below, which also have the dtype and device of x.
        y: the output of the sub-layer [B, N, C].
        gate: of this sub-layer; shift, scale: of the next one. [B, 1, C], per group of tokens [B, G, C] with
            one G, a divisor of N, such as the frames, or per token [B, N, C]; other strides may be 0
            (expanded). None: a gate of 1, a shift or scale of 0.
        weight, bias: of the norm, [C]. None: 1 and 0.
        eps: added to the variance.
        x_rows: int32 [B]; row b of the batch is row x_rows[b] of x, which may have any number of rows.
        out: [B, N, C] for x_out, may be x itself (not with x_rows).
        norm_out: [B, N, C] for the norm; must not overlap other arguments. Pass both out and norm_out, or
            neither.

    Under autocast y, gate, shift, scale, weight and bias of another floating dtype are cast to that of x.

    Returns:
        x_out [B, N, C] and normed [B, N, C].

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it. Out-of-range x_rows raise on the
            CPU. On CUDA they are not checked, because that would synchronize; their rows are NaN.

    Source: the adaptive layer norm of a DiT block (arXiv 2212.09748, section 3.2).
    """
    norm = (shift, scale, weight, bias, eps)
    return call("gated_residual_norm", x, y, gate, *norm, x_rows, out=out, norm_out=norm_out)

"""x + gate*y: a sub-layer's output added to the stream in one pass."""

from __future__ import annotations

import torch

from ._dispatch import call


def gated_residual(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    *,
    x_rows: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Add a gated sub-layer output to the stream, bit for bit as eager PyTorch adds gate*y to x.

    Args:
        x: the stream, float32, bfloat16 or float16 [B, N, C]. Contiguous in C, any other strides; this holds
            for all tensors below, which also share x's dtype and device.
        y: the sub-layer's output [B, N, C].
        gate: [B, 1, C], per group of tokens [B, G, C] with G a divisor of N, such as the frames, or per token
            [B, N, C]; other strides may be 0 (expanded). None: 1.
        x_rows: int32 [B]; row b of the batch is row x_rows[b] of x, which may have any number of rows.
        out: [B, N, C] for the result, may be x itself (not with x_rows); None allocates.

    Under autocast y and gate of another floating dtype are cast to x's dtype.

    Returns:
        x_out [B, N, C].

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it. Values of x_rows out of range
            raise on the CPU. On CUDA they are not checked, because that synchronizes: their rows are NaN.

    Source: the residual of a DiT block (arXiv 2212.09748, section 3.2).
    """
    return call("gated_residual", x, y, gate, x_rows, out=out)

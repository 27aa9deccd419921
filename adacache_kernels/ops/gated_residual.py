"""x + gate*y: adds the output of a sub-layer to the stream in one pass."""

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
    """Add a gated sub-layer output to the stream. Bit-identical to x + gate*y in eager PyTorch.

    Args:
        x: the stream, float32, bfloat16 or float16 [B, N, C]. Contiguous in C, any other strides; this holds
            for all tensors below, which also have the dtype and device of x.
        y: the output of the sub-layer [B, N, C].
        gate: [B, 1, C], per group of tokens [B, G, C] with G a divisor of N, such as the frames, or per token
            [B, N, C]; other strides may be 0 (expanded). None: 1.
        x_rows: int32 [B]; row b of the batch is row x_rows[b] of x, which may have any number of rows.
        out: [B, N, C] for the result, may be x itself (not with x_rows); None allocates.

    Under autocast y and gate of another floating dtype are cast to the dtype of x.

    Returns:
        x_out [B, N, C].

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it. Out-of-range x_rows raise on the
            CPU. On CUDA they are not checked, because that would synchronize; their rows are NaN.

    Source: the residual of a DiT block (arXiv 2212.09748, section 3.2).
    """
    return call("gated_residual", x, y, gate, x_rows, out=out)

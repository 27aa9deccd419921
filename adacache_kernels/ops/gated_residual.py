# SPDX-License-Identifier: Apache-2.0
"""x + gate*y: adds the output of a sub-layer to the stream in one pass."""

from __future__ import annotations

import torch

from .._choices import rounding_number
from ._dispatch import call


def gated_residual(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    *,
    gate_table: torch.Tensor | None = None,
    rounding: str = "eager",
    x_rows: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Add a gated sub-layer output to the stream. Bit-identical to eager PyTorch.

    Args:
        x: the stream, float32, bfloat16 or float16 [B, N, C]. Contiguous in C, any other strides; this holds
            for all tensors below, which also have the device of x, and its dtype unless stated otherwise.
        y: the output of the sub-layer [B, N, C].
        gate: [B, 1, C], per group of tokens [B, G, C] with G a divisor of N, such as the frames, or per token
            [B, N, C]; in the dtype of x, or in float32. A dimension of 1 before C is accepted. Other
            strides may be 0 (expanded). None: 1.
        gate_table: float32 [1, 1, C], added to the gate in float32: a learned table plus an embedding, whose
            sum needs no memory.
        rounding: "eager" rounds gate*y to the dtype of x before the addition, like x + gate*y in eager
            PyTorch; "float32" rounds only the sum, like (x.float() + y * gate.float()).to(x.dtype).
        x_rows: int32 [B]; row b of the batch is row x_rows[b] of x, which may have any number of rows.
        out: [B, N, C] for the result, may be x itself (not with x_rows); None allocates.

    Under autocast y is cast to the dtype of x, and so is a gate that is neither in that dtype nor in float32.

    Returns:
        x_out [B, N, C].

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it. Out-of-range x_rows raise on the
            CPU. On CUDA they are not checked, because that would synchronize; their rows are NaN.

    Source: the residual of a DiT block (arXiv 2212.09748, section 3.2); rounding="float32" and gate_table:
    the blocks of Wan (arXiv 2503.20314).
    """
    return call("gated_residual", x, y, gate, gate_table, x_rows, rounding_number(rounding), out=out)

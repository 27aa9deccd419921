# SPDX-License-Identifier: Apache-2.0
"""LN(x) * (1 + scale) + shift in one pass: the adaptive layer norm before each sub-layer of a DiT block."""

from __future__ import annotations

import torch

from ._dispatch import call


def layer_norm_modulate(
    x: torch.Tensor,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    *,
    shift_table: torch.Tensor | None = None,
    scale_table: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    x_rows: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the modulated layer norm of each token.

    With mean and population variance over C: n = (x - mean) / sqrt(variance + eps), n = n * weight + bias,
    y = n * (1 + scale) + shift. Computed in float32 and rounded once to the dtype of x; eager PyTorch rounds
    after each step.

    Args:
        x: the stream, float32, bfloat16 or float16 [B, N, C]. Contiguous in C, any other strides; this holds
            for all tensors below, which also have the device of x, and its dtype unless stated otherwise.
        shift, scale: [B, 1, C], per group of tokens [B, G, C] with G a divisor of N, such as the frames, or
            per token [B, N, C]; both with the same groups, or one of them with 1 or N; each in the dtype of
            x, or in float32. A dimension of 1 before C is accepted. Other strides may be 0 (expanded). None:
            0.
        shift_table, scale_table: float32 [1, 1, C], added to shift and scale in float32: a learned table plus
            an embedding, whose sum needs no memory.
        weight, bias: [C], in the dtype of x, or in float32. None: 1 and 0.
        eps: added to the variance.
        x_rows: int32 [B]; row b of the batch is row x_rows[b] of x, which may have any number of rows.
        out: [B, N, C] for the result, may be x itself (not with x_rows); None allocates.

    Under autocast shift, scale, weight and bias that are neither in the dtype of x nor in float32 are cast to
    the dtype of x.

    Returns:
        y [B, N, C].

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it. Out-of-range x_rows raise on the
            CPU. On CUDA they are not checked, because that would synchronize; their rows are NaN.

    Source: the adaptive layer norm of a DiT block (arXiv 2212.09748, section 3.2).
    """
    tables = (shift_table, scale_table)
    return call("layer_norm_modulate", x, shift, scale, *tables, weight, bias, eps, x_rows, out=out)

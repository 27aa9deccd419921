# SPDX-License-Identifier: Apache-2.0
"""x + gate*y and the modulated norm of the next sub-layer in float8, in one pass over memory."""

from __future__ import annotations

import torch

from .._choices import norm_number, rounding_number
from ._dispatch import call


def gated_residual_norm_float8(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    *,
    gate_table: torch.Tensor | None = None,
    shift_table: torch.Tensor | None = None,
    scale_table: torch.Tensor | None = None,
    rounding: str = "eager",
    norm: str = "layer",
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    x_rows: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    norm_out: torch.Tensor | None = None,
    norm_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Add a gated sub-layer output to the stream, and compute the modulated norm of the result in float8.

    x_out is that of `gated_residual`; the other results are `norm_modulate_float8` of the rounded x_out.

    Args:
        x: the stream, float32, bfloat16 or float16 [B, N, C]. Contiguous in C, any other strides; this holds
            for all tensors below, which also have the device of x, and its dtype unless stated otherwise.
        y: the output of the sub-layer [B, N, C].
        gate: of this sub-layer; shift, scale: of the next one. [B, 1, C], per group of tokens [B, G, C] with
            one G, a divisor of N, such as the frames, or per token [B, N, C]; each in the dtype of x, or in
            float32. A dimension of 1 before C is accepted. Other strides may be 0 (expanded). None: a gate
            of 1, a shift or scale of 0.
        gate_table, shift_table, scale_table: float32 [1, 1, C], added to gate, shift and scale in float32;
            see `gated_residual`.
        rounding: "eager" rounds gate*y to the dtype of x before the addition; "float32" rounds only the sum;
            see `gated_residual`.
        norm: "layer", or "rms" without subtracting the mean: `rms_norm_modulate`.
        weight, bias: of the norm, [C], in the dtype of x, or in float32. None: 1 and 0.
        eps: added to the variance.
        x_rows: int32 [B]; row b of the batch is row x_rows[b] of x, which may have any number of rows.
        out: [B, N, C] for x_out, may be x itself (not with x_rows).
        norm_out: float8_e4m3fn [B, N, C] for the norm; must not overlap other arguments.
        norm_scale: float32 [B, N, 1] for its scales, any strides; must not overlap other arguments. Pass out,
            norm_out and norm_scale, or none of them.

    Under autocast y is cast to the dtype of x, and so are modulators, weight and bias that are neither in
    that dtype nor in float32.

    Returns:
        x_out [B, N, C], normed float8_e4m3fn [B, N, C] and norm_scale float32 [B, N, 1]; see
        `norm_modulate_float8` for tokens that are 0 or not finite.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it. Out-of-range x_rows raise on the
            CPU. On CUDA they are not checked, because that would synchronize; their rows and scales are NaN.

    Source: the adaptive layer norm of a DiT block (arXiv 2212.09748, section 3.2); float8 e4m3 (arXiv
    2209.05433).
    """
    gated = (x, y, gate, gate_table)
    normed = (shift, scale, shift_table, scale_table, weight, bias, eps)
    choices = (rounding_number(rounding), norm_number(norm))
    outputs = {"out": out, "norm_out": norm_out, "norm_scale": norm_scale}
    return call("gated_residual_norm_float8", *gated, *normed, x_rows, *choices, **outputs)

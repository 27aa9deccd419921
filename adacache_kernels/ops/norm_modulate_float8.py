# SPDX-License-Identifier: Apache-2.0
"""The modulated norm of each token in float8 with one scale per token, for the quantized matrix product that
follows."""

from __future__ import annotations

import torch

from .._choices import norm_number
from ._dispatch import call


def norm_modulate_float8(
    x: torch.Tensor,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    *,
    shift_table: torch.Tensor | None = None,
    scale_table: torch.Tensor | None = None,
    norm: str = "layer",
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    x_rows: torch.Tensor | None = None,
    norm_out: torch.Tensor | None = None,
    norm_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the modulated norm of each token, quantized to float8 with one scale per token.

    y is that of `layer_norm_modulate` or `rms_norm_modulate` in float32: it is not rounded to the dtype of x.
    With m = max|y| of the token: norm_scale = m / 448, normed = float8(y * (448 / m)), so that y is about
    normed.float() * norm_scale.

    Args:
        x: the stream, float32, bfloat16 or float16 [B, N, C]. Contiguous in C, any other strides; this holds
            for all tensors below, which also have the device of x, and its dtype unless stated otherwise.
        shift, scale: [B, 1, C], per group of tokens [B, G, C] with G a divisor of N, such as the frames, or
            per token [B, N, C]; both with the same groups, or one of them with 1 or N; each in the dtype of
            x, or in float32. A dimension of 1 before C is accepted. Other strides may be 0 (expanded). None:
            0.
        shift_table, scale_table: float32 [1, 1, C], added to shift and scale in float32: a learned table plus
            an embedding, whose sum needs no memory.
        norm: "layer", or "rms" without subtracting the mean: `rms_norm_modulate`.
        weight, bias: [C], in the dtype of x, or in float32. None: 1 and 0.
        eps: added to the variance.
        x_rows: int32 [B]; row b of the batch is row x_rows[b] of x, which may have any number of rows.
        norm_out: float8_e4m3fn [B, N, C] for the norm; must not overlap other arguments.
        norm_scale: float32 [B, N, 1] for the scales, any strides; must not overlap other arguments. Pass both
            norm_out and norm_scale, or neither.

    Under autocast shift, scale, weight and bias that are neither in the dtype of x nor in float32 are cast to
    the dtype of x.

    Returns:
        normed float8_e4m3fn [B, N, C] and norm_scale float32 [B, N, 1]. A token with m < 2^-100, such as one
        of zeros, has scale 1. A token with a NaN is NaN, with scale NaN. In a token with an infinity that
        element is NaN, the others are 0, and the scale is infinite. With C = 0 the scales are undefined.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it. Out-of-range x_rows raise on the
            CPU. On CUDA they are not checked, because that would synchronize; their rows and scales are NaN.

    Source: the adaptive layer norm of a DiT block (arXiv 2212.09748, section 3.2); float8 e4m3 (arXiv
    2209.05433).
    """
    normed = (shift, scale, shift_table, scale_table, weight, bias, eps)
    outputs = {"norm_out": norm_out, "norm_scale": norm_scale}
    return call("norm_modulate_float8", x, *normed, x_rows, norm_number(norm), **outputs)

# SPDX-License-Identifier: Apache-2.0
"""`gated_residual_meter` and the modulated norm of the next sub-layer, in one pass over memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .._choices import norm_number, rounding_number
from ..columns import metric_number
from ._dispatch import call


def gated_residual_norm_meter(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    residual: torch.Tensor,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    *,
    gate_table: torch.Tensor | None = None,
    shift_table: torch.Tensor | None = None,
    scale_table: torch.Tensor | None = None,
    rounding: str = "eager",
    norm: str = "layer",
    frames: int,
    strides: Sequence[int] = (1,),
    video_of_row: torch.Tensor | None = None,
    num_videos: int = 1,
    metric: str = "l1",
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    residual_scale: torch.Tensor | None = None,
    x_rows: torch.Tensor | None = None,
    residual_rows: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    norm_out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Add, cache and measure a gated residual, and compute the modulated norm of the result.

    x_out, residual and sums are those of `gated_residual_meter`; the second result is `layer_norm_modulate`
    (or `rms_norm_modulate`) of the rounded x_out.

    Args:
        x: the stream, float32, bfloat16 or float16 [B, N, C] with N = frames * places, frame-major.
            Contiguous in C, any other strides; this holds for all tensors below, which also have the dtype
            and device of x unless stated otherwise.
        y: the output of the sub-layer [B, N, C].
        gate: of this sub-layer; shift, scale: of the next one. [B, 1, C], per frame [B, frames, C] or per
            token [B, N, C]; each in the dtype of x, or in float32. A dimension of 1 before C is accepted.
            Other strides may be 0 (expanded). None: a gate of 1, a shift or scale of 0.
        residual: [B, N, C], the residual of the last computed step; overwritten with r = gate*y. In the dtype
            of x, or float8_e4m3fn with `residual_scale`.
        gate_table, shift_table, scale_table: float32 [1, 1, C], added to gate, shift and scale in float32;
            see `gated_residual`.
        rounding: "eager" rounds gate*y to the dtype of x before the addition; "float32" rounds only the sum;
            see `gated_residual`.
        norm: "layer", or "rms" without subtracting the mean: `rms_norm_modulate`.
        frames: latent frames T; divides N.
        strides: frame distances of the motion term, each in 1..frames-1, at most 8; may be empty.
        video_of_row: int32 [B], the video of each row, 0..num_videos-1. None: all rows are one video.
        num_videos: number of videos, 1 to 65536. Sums are per video.
        metric: "l1", "l2" or "cosine": the distance for `decide`. "l1" skips the squares.
        weight, bias: of the norm, [C], in the dtype of x, or in float32. None: 1 and 0.
        eps: added to the variance.
        residual_scale: float32 [rows of residual, N], any strides; required for float8 residuals only; see
            `gated_residual_meter`.
        x_rows: int32 [B]; row b of the batch is row x_rows[b] of x, which may have any number of rows.
        residual_rows: int32 [B], distinct; the same for residual and residual_scale.
        out: [B, N, C] for x_out, may be x itself (not with x_rows).
        norm_out: [B, N, C] for the norm; must not overlap other arguments. Pass both out and norm_out, or
            neither.

    Under autocast y is cast to the dtype of x, and so are modulators, weight and bias that are neither in
    that dtype nor in float32.

    Returns:
        x_out [B, N, C], normed [B, N, C], and sums float64 [num_videos, columns], columns named by
        `sum_columns(strides)`; see `gated_residual_meter`.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it. Out-of-range video ids and row
            indices raise on the CPU. On CUDA they are not checked, because that would synchronize: with an
            out-of-range id all sums are NaN; with an out-of-range index the cache is not written, and the
            outputs of the row and the sums of its video are NaN.

    Source: AdaCache (arXiv 2411.02397), and the adaptive layer norm of a DiT block (arXiv 2212.09748, section
    3.2).
    """
    meter = (video_of_row, num_videos, frames, strides, metric_number(metric))
    gated = (x, y, gate, gate_table, residual, residual_scale)
    normed = (shift, scale, shift_table, scale_table, weight, bias, eps)
    rest = (x_rows, residual_rows, rounding_number(rounding), norm_number(norm))
    return call("gated_residual_norm_meter", *gated, *normed, *rest, *meter, out=out, norm_out=norm_out)

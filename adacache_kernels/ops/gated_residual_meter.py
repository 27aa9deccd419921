"""x + gate*y, with the residual gate*y kept and metered against the last one in the same pass over memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import reference
from .._arguments import cast_under_autocast, check_gated_residual_meter, explain_refusal, refuse_grad
from .._backend import choose_backend
from ..columns import METRICS, metric_number


def gated_residual_meter(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor,
    residual: torch.Tensor,
    *,
    frames: int,
    strides: Sequence[int] = (1,),
    video_of_row: torch.Tensor | None = None,
    num_videos: int = 1,
    metric: str = "l1",
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a gated sub-layer output to the stream, keep the gated residual, and measure how much it changed.

    r = gate*y and x_out = x + r are bit for bit what eager PyTorch gives in this dtype: r is rounded to the
    dtype before it is added and before it is measured. Sums are taken in a fixed order: the same input gives
    the same bits.

    Args:
        x: the stream, float32, bfloat16 or float16 [B, N, C] with N = frames * places, frame-major.
            Contiguous in C, any other strides; this holds for all tensors below, which also share x's dtype
            and device.
        y: the sub-layer's output [B, N, C].
        gate: [B, 1, C], per frame [B, frames, C] or per token [B, N, C]; other strides may be 0 (expanded).
        residual: [B, N, C], holds the residual of the last computed step and is overwritten with r.
        frames: latent frames T; divides N.
        strides: frame distances of the motion term, each in 1..frames-1, at most 8; may be empty.
        video_of_row: int32 [B], the video in 0..num_videos-1 that each row belongs to. None: all rows are one
            video's.
        num_videos: videos that are measured apart.
        metric: "l1", "l2" or "cosine": the distance that `decide` will take. "l1" leaves out the squares.
        out: [B, N, C] for x_out, may be x itself; None allocates.

    Under autocast y and gate of another floating dtype are cast to x's dtype.

    Returns:
        x_out [B, N, C], and sums float64 [num_videos, columns], columns named by `sum_columns(strides)`. A
        video without rows has sums 0. Non-finite input gives non-finite sums, which `decide` takes for
        "compute".

    Raises:
        ValueError: an argument does not fit; the message names it. Values of video_of_row outside
            0..num_videos-1 raise on the CPU; on a GPU, where looking would stop the stream, they make all
            sums NaN.

    Source: AdaCache (arXiv 2411.02397), and `compute_next_step` of the published code.
    """
    if y.dtype is not x.dtype or gate.dtype is not x.dtype:
        y, gate = cast_under_autocast(x, y, gate)
    if torch.is_grad_enabled():
        refuse_grad(x=x, y=y, gate=gate, residual=residual, out=out)
    kind = METRICS.get(metric)
    if kind is None:
        kind = metric_number(metric)
    backend = choose_backend(x.device)
    if backend == "cpu" or backend == "cuda":
        ops = torch.ops.adacache
        try:
            if out is None:
                return ops.gated_residual_meter(
                    x, y, gate, residual, video_of_row, num_videos, frames, strides, kind
                )
            sums = ops.gated_residual_meter_out(
                x, y, gate, residual, video_of_row, num_videos, frames, strides, kind, out
            )
            return out, sums
        except (RuntimeError, ValueError):  # which of the two depends on the version of torch
            explain_refusal(
                check_gated_residual_meter,
                x,
                y,
                gate,
                residual,
                video_of_row,
                num_videos,
                frames,
                strides,
                out,
            )
            raise
    check_gated_residual_meter(x, y, gate, residual, video_of_row, num_videos, frames, strides, out)
    if backend == "triton":
        from .. import triton

        return triton.gated_residual_meter(
            x, y, gate, residual, video_of_row, num_videos, frames, strides, kind, out
        )
    return reference.gated_residual_meter(
        x, y, gate, residual, video_of_row, num_videos, frames, strides, kind, out
    )

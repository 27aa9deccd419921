"""A linear layer and `gated_residual_meter` of its output; in one kernel where that was measured to be
faster."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import _backend
from .._arguments import check_linear, check_linear_gated_residual_meter, refuse_grad
from ..columns import metric_number
from ._fake import ARGUMENTS
from ._fused_table import fused_is_faster
from .gated_residual_meter import gated_residual_meter

_OP = "linear_gated_residual_meter_out"


def linear_gated_residual_meter(
    a: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    x: torch.Tensor,
    gate: torch.Tensor | None,
    residual: torch.Tensor,
    *,
    frames: int,
    strides: Sequence[int] = (1,),
    video_of_row: torch.Tensor | None = None,
    num_videos: int = 1,
    metric: str = "l1",
    residual_scale: torch.Tensor | None = None,
    x_rows: torch.Tensor | None = None,
    residual_rows: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    fused: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y = a @ weight.T + bias, the last linear layer of a sub-layer, and `gated_residual_meter` of y.

    The fused kernel (Triton) keeps y out of memory. It differs from the linear layer of PyTorch by the order
    in which products are added, and so by a rounding of y; from y on, all is as in `gated_residual_meter`.

    Whether it is faster depends on how well its matrix product does on a GPU against that of cuBLAS. A table
    in the package (`linear_gated_residual_meter.json`) says for which devices, dtypes and sizes it was
    measured to be. No GPU has measured it so far: the table is empty, and `fused=None` never fuses.

    Args:
        a: input of the linear layer [B, N, K], N = frames * places, frame-major.
        weight, bias: [C, K] and [C] or None, as in torch.nn.Linear.
        x, gate, residual, frames, strides, video_of_row, num_videos, metric, residual_scale, x_rows,
        residual_rows, out: see `gated_residual_meter`.
        fused: True runs the fused kernel, False the linear layer and then the meter, None as the table says.

    Returns:
        x_out [B, N, C] and sums; see `gated_residual_meter`.

    Raises:
        ValueError: an argument does not fit; the message names it. fused=True takes no float8 residual (its
            scales need whole tokens) and one dtype for all tensors.
        RuntimeError: fused=True where Triton cannot run.
    """
    metering = (video_of_row, num_videos, frames, strides, metric_number(metric))
    if fused is None:
        fused = fused_is_faster(a, weight, frames) and _fits(a, weight, x, residual_scale)
    if not fused:
        check_linear(a, weight, bias, x)
        return gated_residual_meter(
            x,
            torch.nn.functional.linear(a, weight, bias),
            gate,
            residual,
            frames=frames,
            strides=strides,
            video_of_row=video_of_row,
            num_videos=num_videos,
            metric=metric,
            residual_scale=residual_scale,
            x_rows=x_rows,
            residual_rows=residual_rows,
            out=out,
        )
    reason = _triton_is_missing(x.device.type)
    if reason:
        raise RuntimeError(f"fused: the fused op is a Triton kernel, which cannot run here: {reason}")
    if residual_scale is not None:
        raise ValueError("residual_scale: expected None for the fused op, which takes no float8 residual")
    arguments = (a, weight, bias, x, gate, residual, x_rows, residual_rows, *metering)
    check_linear_gated_residual_meter(*arguments, out)
    if torch.is_grad_enabled():
        refuse_grad(ARGUMENTS[_OP], (*arguments, out))
    if out is None:
        size = (*a.shape[:2], weight.shape[0])
        out = torch.empty_like(x) if x_rows is None else x.new_empty(size)
    from .. import triton  # noqa: F401  (registers the op)

    return out, torch.ops.adacache_triton.linear_gated_residual_meter_out(*arguments, out)


def _fits(a: torch.Tensor, weight: torch.Tensor, x: torch.Tensor, scale: torch.Tensor | None) -> bool:
    one_dtype = a.dtype == weight.dtype == x.dtype
    return one_dtype and scale is None and _triton_is_missing(x.device.type) is None


def _triton_is_missing(device_type: str) -> str | None:
    """Why Triton cannot run the fused kernel, None if it can."""
    if not _backend._takes("triton", device_type):
        return f"it takes no tensors on {device_type!r}"
    return _backend._missing("triton")

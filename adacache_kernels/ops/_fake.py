"""Schemas and fake kernels of the ops: what tracing needs to know of them. Shared by the compiled and the
Triton ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..columns import sum_columns

_METER = "Tensor? video_of_row, int num_videos, int frames, int[] strides, int metric"

#: As the compiled library defines them; `tests/ops` compares the two.
SCHEMAS = {
    "gated_residual_meter": (
        f"(Tensor x, Tensor y, Tensor gate, Tensor(a!) residual, {_METER}) -> (Tensor, Tensor)"
    ),
    "gated_residual_meter_out": (
        f"(Tensor x, Tensor y, Tensor gate, Tensor(a!) residual, {_METER}, Tensor(b!) out) -> Tensor"
    ),
    "residual_meter": f"(Tensor residual, Tensor old, {_METER}) -> Tensor",
    "reuse_residual": "(Tensor x, Tensor residual, Tensor? video_of_row, Tensor? reuse) -> Tensor",
    "reuse_residual_out": (
        "(Tensor x, Tensor residual, Tensor? video_of_row, Tensor? reuse, Tensor(a!) out) -> ()"
    ),
    "decide": (
        "(Tensor sums, Tensor(a!) state, Tensor thresholds, Tensor rates, int step, int num_steps, int site, "
        "int frames, int[] strides, int metric, int rule, float elements, int first_step, int last_step, "
        "float scale, float power, float divisor, float gradient_weight) -> ()"
    ),
}


def _check_devices(*tensors: torch.Tensor | None) -> None:
    # A meta tensor among others brings the call here and not to the kernel, which would have refused it.
    if len({tensor.device for tensor in tensors if tensor is not None}) > 1:
        raise RuntimeError("all tensors: expected one device")


def _sums(like: torch.Tensor, num_videos: int, strides: Sequence[int]) -> torch.Tensor:
    return like.new_empty((num_videos, len(sum_columns(strides))), dtype=torch.float64)


def _gated_residual_meter(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor,
    residual: torch.Tensor,
    video_of_row: torch.Tensor | None,
    num_videos: int,
    frames: int,
    strides: Sequence[int],
    metric: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_devices(x, y, gate, residual, video_of_row)
    return torch.empty_like(x), _sums(x, num_videos, strides)


def _gated_residual_meter_out(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor,
    residual: torch.Tensor,
    video_of_row: torch.Tensor | None,
    num_videos: int,
    frames: int,
    strides: Sequence[int],
    metric: int,
    out: torch.Tensor,
) -> torch.Tensor:
    _check_devices(x, y, gate, residual, video_of_row, out)
    return _sums(x, num_videos, strides)


def _residual_meter(
    residual: torch.Tensor,
    old: torch.Tensor,
    video_of_row: torch.Tensor | None,
    num_videos: int,
    frames: int,
    strides: Sequence[int],
    metric: int,
) -> torch.Tensor:
    _check_devices(residual, old, video_of_row)
    return _sums(residual, num_videos, strides)


def _reuse_residual(
    x: torch.Tensor, residual: torch.Tensor, video_of_row: torch.Tensor | None, reuse: torch.Tensor | None
) -> torch.Tensor:
    _check_devices(x, residual, video_of_row, reuse)
    return torch.empty_like(x)


def _nothing(*arguments: Any) -> None:
    _check_devices(*(argument for argument in arguments if isinstance(argument, torch.Tensor)))


FAKE_KERNELS: dict[str, Callable[..., Any]] = {
    "gated_residual_meter": _gated_residual_meter,
    "gated_residual_meter_out": _gated_residual_meter_out,
    "residual_meter": _residual_meter,
    "reuse_residual": _reuse_residual,
    "reuse_residual_out": _nothing,
    "decide": _nothing,
}


def register_fake_kernels() -> None:
    """Give the compiled ops their fake kernels; without the compiled library there are no ops to give them
    to."""
    for name, fake in FAKE_KERNELS.items():
        if hasattr(torch.ops.adacache, name):
            torch.library.register_fake(f"adacache::{name}", fake)

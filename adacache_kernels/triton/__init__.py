"""The ops as Triton kernels: for GPUs without the compiled CUDA library, and for tests without a GPU.

They are registered as torch.ops.adacache_triton.*, with the schemas of the compiled ops, so that
torch.compile takes each launch as one opaque op.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..ops._fake import FAKE_KERNELS, SCHEMAS
from . import decide as _decide
from . import fused_qk_norm_rope as _fused_qk_norm_rope
from . import gated_residual_meter as _gated_residual_meter
from . import residual_meter as _residual_meter
from . import reuse_residual as _reuse_residual
from . import temporal_attention as _temporal_attention
from .numeric import INTERPRETED

__all__ = ["INTERPRETED", "decide", "gated_residual_meter", "residual_meter", "reuse_residual"]


def gated_residual_meter(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor,
    residual: torch.Tensor,
    video_of_row: torch.Tensor | None,
    num_videos: int,
    frames: int,
    strides: Sequence[int],
    metric: int,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    if out is None:
        out = torch.empty_like(x)
    sums = torch.ops.adacache_triton.gated_residual_meter_out(
        x, y, gate, residual, video_of_row, num_videos, frames, strides, metric, out
    )
    return out, sums


def residual_meter(
    residual: torch.Tensor,
    old: torch.Tensor,
    video_of_row: torch.Tensor | None,
    num_videos: int,
    frames: int,
    strides: Sequence[int],
    metric: int,
) -> torch.Tensor:
    sums: torch.Tensor = torch.ops.adacache_triton.residual_meter(
        residual, old, video_of_row, num_videos, frames, strides, metric
    )
    return sums


def reuse_residual(
    x: torch.Tensor,
    residual: torch.Tensor,
    video_of_row: torch.Tensor | None,
    reuse: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    if out is None:
        out = torch.empty_like(x)
    torch.ops.adacache_triton.reuse_residual_out(x, residual, video_of_row, reuse, out)
    return out


def decide(*arguments: Any) -> None:
    torch.ops.adacache_triton.decide(*arguments)


_LAUNCHERS = {
    "gated_residual_meter_out": _gated_residual_meter.gated_residual_meter,
    "residual_meter": _residual_meter.residual_meter,
    "reuse_residual_out": _reuse_residual.reuse_residual,
    "decide": _decide.decide,
    "fused_qk_norm_rope": _fused_qk_norm_rope.fused_qk_norm_rope,
    "temporal_attention_out": _temporal_attention.temporal_attention,
}

_library = torch.library.Library("adacache_triton", "DEF")
for _name, _launcher in _LAUNCHERS.items():
    _library.define(_name + SCHEMAS[_name])
    _library.impl(_name, _launcher, "CPU" if INTERPRETED else "CUDA")
    torch.library.register_fake(f"adacache_triton::{_name}", FAKE_KERNELS[_name], lib=_library)

# SPDX-License-Identifier: Apache-2.0
"""STDiT3 of the Open-Sora repository (`opensora`, 1.2 and 1.3) and of `videosys`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adacache.adapters.spec import Arguments, BlockList, GatedResidual, ModelSpec, Outputs
from adacache.fused.open_sora import OpenSoraBlock
from adacache.rows import Split


def gated_attention(block: Any, outputs: Outputs, given: Arguments) -> Tensor:
    """gate * attention as [B, T*S, C]; frames that x_mask excludes have the gate at timestep 0."""
    x, frames = given["x"], given["T"]
    y = outputs["attn"]
    if y.ndim == 5:
        y = y.flatten(1, 2).flatten(0, 1)  # 1.3 attends in windows of [B, H, W, T, C]
    y = y.unflatten(0, (x.shape[0], -1))
    y = y.transpose(1, 2) if block.temporal else y
    table = block.scale_shift_table[2]

    def gate(time: Tensor) -> Tensor:
        gates = time.reshape(x.shape[0], 6, -1)[:, 2]
        return (table + gates)[:, None, None]

    residual = gate(given["t"]) * y
    mask = given.get("x_mask")
    if mask is not None:
        residual = torch.where(mask[:, :, None, None], residual, gate(given["t0"]) * y)
    return residual.reshape(x.shape[0], frames * residual.shape[2], -1)


def select(name: str, value: Any, split: Split, given: Arguments) -> Any:
    """Packed captions: those of all rows one after the other in y [1, sum of lengths, C]."""
    lengths = given.get("mask")
    if name not in ("y", "y_null", "mask") or value is None or not isinstance(lengths, list):
        return None
    if name == "mask":
        return [lengths[row] for row in split.computing]
    pieces = value.split(lengths, dim=1)
    return torch.cat([pieces[row] for row in split.computing], dim=1)


_CROSS = {"cross_attention": "cross_attn", "mlp": "mlp"}

OPEN_SORA = ModelSpec(
    classes=("STDiT3",),
    lists=(
        BlockList("spatial_blocks", "spatial", outputs={"spatial_attention": "attn", **_CROSS}),
        BlockList("temporal_blocks", "temporal", outputs={"temporal_attention": "attn", **_CROSS}),
    ),
    alternating=True,
    streams=("x",),
    latents="x",
    residuals=(
        GatedResidual("temporal_attention", "temporal_blocks", ("attn",), gated_attention),
        GatedResidual("spatial_attention", "spatial_blocks", ("attn",), gated_attention),
    ),
    default_part="temporal_attention",
    select=select,
    block_program=OpenSoraBlock(),
)

"""Open-Sora's STDiT3 as in its own repository (`opensora`, 1.2 and 1.3) and in `videosys`; ours has an
adapter of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adacache.adapters.blocks import Arguments, BlockAdapter, BlockList, Rows, Seen, Watched


def gated_attention(block: Any, seen: Seen, given: Arguments) -> Tensor:
    """gate * attention as [B, T*S, C], of the frames that x_mask excludes with the gate at timestep 0."""
    x, frames = given["x"], given["T"]
    y = seen["attn"]
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


class OpenSoraAdapter(BlockAdapter):
    classes = ("STDiT3",)
    lists = (BlockList("spatial_blocks", "spatial"), BlockList("temporal_blocks", "temporal"))
    alternating = True
    streams = ("x",)
    latents = "x"
    parts = (
        Watched("temporal_attention", "temporal_blocks", ("attn",), gated_attention),
        Watched("spatial_attention", "spatial_blocks", ("attn",), gated_attention),
    )
    default_part = "temporal_attention"

    def select(self, name: str, value: Any, rows: Rows, given: Arguments) -> Any:
        lengths = given.get("mask")
        if name in ("y", "y_null", "mask") and value is not None and isinstance(lengths, list):
            # Captions of all rows stand one after the other in y [1, sum of lengths, C].
            if name == "mask":
                return [lengths[row] for row in rows.rows]
            pieces = value.split(lengths, dim=1)
            return torch.cat([pieces[row] for row in rows.rows], dim=1)
        return super().select(name, value, rows, given)

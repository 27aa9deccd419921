# SPDX-License-Identifier: Apache-2.0
"""The block of Open-Sora's STDiT3 (`opensora` 1.2 and 1.3) and of `videosys`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adacache.fused.modules import hooked
from adacache.fused.norms import ModelNorm
from adacache.fused.program import Add
from adacache.interpose import plain_class


class OpenSoraBlock:
    """See `BlockProgram`."""

    parts: tuple[str, ...] = ("attention", "cross_attention", "mlp")
    forwards = frozenset(
        {
            "f67af7dd74327bda",  # opensora 1.2
            "4b79a519322468bb",  # opensora 1.3
            "dfde26c026cb289a",  # videosys
        }
    )

    def refuses(self, block: Any) -> str | None:
        drop = getattr(block, "drop_path", None)
        if drop is not None and (hooked(drop) or (block.training and not isinstance(drop, nn.Identity))):
            return "it drops paths"
        manager = getattr(block, "parallel_manager", None)
        if getattr(manager, "sp_size", 1) > 1:
            return "it runs on several devices"
        kind: Any = plain_class(block)
        broadcasts = kind.forward.__globals__.get("enable_pab")
        return "videosys caches in it" if broadcasts is not None and broadcasts() else None

    def takes(self, block: Any, given: Mapping[str, Any]) -> bool:
        indices = given.get("mask_index")
        return indices is None or not len(indices)

    def run(self, block: Any, given: Mapping[str, Any], add: Add) -> Tensor:
        x: Tensor = given["x"]
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self._modulation(block, given)
        y = self._attention(block, add.norm(x, ModelNorm(block.norm1, shift, scale)), given)
        x, _ = add("attention", x, y, gate)
        y = block.cross_attn(x, given["y"], given.get("mask"))
        x, before_mlp = add("cross_attention", x, y, None, ModelNorm(block.norm2, shift_mlp, scale_mlp))
        return add("mlp", x, block.mlp(before_mlp), gate_mlp)[0]

    def _modulation(self, block: Any, given: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """[B, 1, C] each, or [B, T, C]: frames that x_mask excludes have that of timestep 0."""
        batch, mask = given["x"].shape[0], given.get("x_mask")
        now = block.scale_shift_table[None] + given["t"].reshape(batch, 6, -1)
        if mask is None:
            return now.chunk(6, dim=1)
        then = block.scale_shift_table[None] + given["t0"].reshape(batch, 6, -1)
        return torch.where(mask[:, None, :, None], now[:, :, None], then[:, :, None]).unbind(1)

    def _attention(self, block: Any, x: Tensor, given: Mapping[str, Any]) -> Tensor:
        """Over frames or over places of [B, T*S, C]; windowed attention of 1.3 takes [B, H, W, T, C]."""
        frames, grid = given["T"], (given.get("H"), given.get("W"))
        by_frame = x.unflatten(1, (frames, -1))
        if not block.temporal:
            sizes = {} if not getattr(block, "enable_2d_rope", False) else dict(zip("HW", grid, strict=True))
            if sizes:
                sizes["scale"] = given.get("scale")
            return block.attn(by_frame.flatten(0, 1), **sizes).reshape(x.shape)
        if getattr(block.attn, "kernel_size", None) is not None:
            windows = by_frame.unflatten(2, grid).permute(0, 2, 3, 1, 4)
            return block.attn(windows, scale=given.get("scale")).permute(0, 3, 1, 2, 4).reshape(x.shape)
        y = block.attn(by_frame.transpose(1, 2).flatten(0, 1)).unflatten(0, (x.shape[0], -1))
        return y.transpose(1, 2).reshape(x.shape)

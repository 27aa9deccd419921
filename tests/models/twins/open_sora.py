# SPDX-License-Identifier: Apache-2.0
"""STDiT3 of Open-Sora v1.2.0 and v1.3 (videosys has that of 1.2). Spatial and temporal blocks take [B, T*S,
C] and reshape it; captions of all rows are packed, with their lengths in `mask`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from twins.parts import Attention, Patches, TimeEmbedding, mlp, norm


class PackedCrossAttention(Attention):
    """Cross-attention to the captions of all rows, packed as [1, sum of lengths, C]."""

    def forward(self, x: Tensor, cond: Tensor, mask: list[int]) -> Tensor:  # type: ignore[override]
        pieces = cond.split(mask, dim=1)
        return torch.cat(
            [super(PackedCrossAttention, self).forward(x[b : b + 1], piece) for b, piece in enumerate(pieces)]
        )


class WindowAttention(Attention):
    """Attention over [B, H, W, T, C] as in 1.3; here the window is the whole clip."""

    kernel_size = (8, 8, 8)

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:  # type: ignore[override]
        return super().forward(x.flatten(1, 3)).reshape(x.shape)


class STDiT3Block(nn.Module):
    def __init__(self, dim: int, temporal: bool, windows: bool = False):
        super().__init__()
        self.temporal, self.windows = temporal, windows
        self.norm1, self.cross_attn = norm(dim), PackedCrossAttention(dim)
        self.attn = WindowAttention(dim) if windows else Attention(dim)
        self.norm2, self.mlp = norm(dim), mlp(dim)
        self.scale_shift_table = nn.Parameter(torch.zeros(6, dim))

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        t: Tensor,
        mask: Any = None,
        x_mask: Tensor | None = None,
        t0: Tensor | None = None,
        T: int | None = None,
        S: int | None = None,
        H: int | None = None,
        W: int | None = None,
    ) -> Tensor:
        now = (self.scale_shift_table[None] + t.reshape(x.shape[0], 6, -1)).chunk(6, dim=1)
        zero = (
            now
            if t0 is None
            else (self.scale_shift_table[None] + t0.reshape(x.shape[0], 6, -1)).chunk(6, dim=1)
        )

        def by_frame(first: Tensor, second: Tensor) -> Tensor:
            if x_mask is None:
                return first
            frames = [value.unflatten(1, (T, S)) for value in (first, second)]
            return torch.where(x_mask[:, :, None, None], *frames).flatten(1, 2)

        def modulated(value: Tensor, shift: int, scale: int) -> Tensor:
            return by_frame(*(value * (1 + some[scale]) + some[shift] for some in (now, zero)))

        y_m = modulated(self.norm1(x), 0, 1).unflatten(1, (T, S))
        if self.windows:
            y_m = self.attn(y_m.unflatten(2, (H, W)).permute(0, 2, 3, 1, 4)).permute(0, 3, 1, 2, 4)
            y_m = y_m.flatten(2, 3)
        elif self.temporal:
            y_m = self.attn(y_m.transpose(1, 2).flatten(0, 1)).unflatten(0, (-1, S)).transpose(1, 2)
        else:
            y_m = self.attn(y_m.flatten(0, 1)).unflatten(0, (-1, T))
        y_m = y_m.flatten(1, 2)
        x = x + by_frame(now[2] * y_m, zero[2] * y_m)
        x = x + self.cross_attn(x, y, mask)
        y_m = self.mlp(modulated(self.norm2(x), 3, 4))
        return x + by_frame(now[5] * y_m, zero[5] * y_m)


class STDiT3(nn.Module):
    def __init__(self, dim: int = 16, depth: int = 4, windows: bool = False):
        super().__init__()
        self.x_embedder, self.t_embedder, self.y_embedder = (
            Patches(dim),
            TimeEmbedding(dim),
            nn.Linear(12, dim),
        )
        self.spatial_blocks = nn.ModuleList(STDiT3Block(dim, temporal=False) for _ in range(depth))
        self.temporal_blocks = nn.ModuleList(STDiT3Block(dim, True, windows) for _ in range(depth))

    def forward(
        self, x: Tensor, timestep: Tensor, y: Tensor, mask: Any = None, x_mask: Any = None, **_: Any
    ) -> Tensor:
        dtype = self.y_embedder.weight.dtype
        x, y = x.to(dtype), y.to(dtype)
        height, width = x.shape[3] // 2, x.shape[4] // 2
        t, _embedded = self.t_embedder(timestep)
        t0 = None if x_mask is None else self.t_embedder(torch.zeros_like(timestep))[0]
        y = self.y_embedder(y).squeeze(1)
        if mask is None:
            lengths = [y.shape[1]] * y.shape[0]
        else:
            lengths = mask.sum(dim=1).tolist()
            y = y.masked_select(mask.unsqueeze(-1) != 0)
        y = y.reshape(1, -1, self.y_embedder.out_features)
        x = self.x_embedder(x)
        frames, places = x.shape[1:3]
        x = x.flatten(1, 2)
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            x = spatial(x, y, t, lengths, x_mask, t0, frames, places, height, width)
            x = temporal(x, y, t, lengths, x_mask, t0, frames, places, height, width)
        return self.x_embedder.unpatchify(x.unflatten(1, (frames, places)), height, width).float()

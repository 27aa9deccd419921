# SPDX-License-Identifier: Apache-2.0
"""Layers shared by the twins."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Self-attention on [sequences, length, C], or cross-attention to `encoder_hidden_states`."""

    def __init__(self, dim: int, heads: int = 2):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_kv, self.to_out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q = self.to_q(hidden_states).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.to_kv(source).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.to_out(F.scaled_dot_product_attention(q, k, v, attention_mask).transpose(1, 2).flatten(2))


def mlp(dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(approximate="tanh"), nn.Linear(2 * dim, dim))


def norm(dim: int) -> nn.LayerNorm:
    return nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)


class TimeEmbedding(nn.Module):
    """[B] -> ([B, 6 * C], [B, C])."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear, self.six = nn.Linear(8, dim), nn.Linear(dim, 6 * dim)

    def forward(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        angle = timestep[:, None].float() / 200 * torch.exp(-torch.arange(4.0))[None]
        wave = torch.cat((angle.cos(), angle.sin()), -1).to(self.linear.weight.dtype)
        embedded = self.linear(wave)
        return self.six(F.silu(embedded)), embedded


class Patches(nn.Module):
    """Latents [B, 4, T, 2h, 2w] to tokens [B, T, h * w, C], and back."""

    def __init__(self, dim: int):
        super().__init__()
        self.proj, self.back = nn.Linear(16, dim), nn.Linear(dim, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(4, (-1, 2)).unflatten(3, (-1, 2))
        return self.proj(x.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(2, 3))

    def unpatchify(self, x: Tensor, height: int, width: int) -> Tensor:
        x = self.back(x).unflatten(2, (height, width)).unflatten(-1, (4, 2, 2))
        return x.permute(0, 4, 1, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)

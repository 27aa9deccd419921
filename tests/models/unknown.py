# SPDX-License-Identifier: Apache-2.0
"""Models without an adapter, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """A block without an adapter."""

    def __init__(self, dim: int = 8):
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, hidden_states: Tensor, time: Tensor) -> Tensor:
        return hidden_states + torch.tanh(self.linear(hidden_states) * time)


class Unknown(nn.Module):
    """A model without an adapter, with two block lists."""

    def __init__(self, second: int = 3, attribute: str = "zeta", first: int = 4):
        super().__init__()
        self.attribute = attribute
        setattr(self, attribute, nn.ModuleList(Block() for _ in range(first)))
        self.alpha = nn.ModuleList(Block() for _ in range(second))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        time = (timestep.view(-1, 1, 1) / 1000).to(x.dtype)
        for block in (*getattr(self, self.attribute), *self.alpha):
            x = block(x, time)
        return x * 0.1


class Flat(nn.Module):
    """A model without a block list."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.block(x, timestep)

# SPDX-License-Identifier: Apache-2.0
"""Sequence parallelism of spatial-temporal networks: each rank has some of the frames or of the positions.

Attention over the dimension that is split gets all of it by an all-to-all, which splits the other dimension
instead (DSP, arXiv 2403.10266). Every other layer acts on single tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

SPLITS = ("frames", "positions")


@dataclass(frozen=True)
class SequenceParallel:
    """How tokens [B, T*S, C], frame-major, are split over the ranks of a process group.

    Attributes:
        group: a `torch.distributed.ProcessGroup`.
        split: "frames" or "positions".
    """

    group: Any
    split: str = "frames"

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"split: expected one of {list(SPLITS)}, got {self.split!r}")
        if not isinstance(self.group, dist.ProcessGroup):
            raise ValueError(f"group: expected a ProcessGroup, got {type(self.group).__name__}")

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    def sizes(self, count: int) -> list[int]:
        """Parts of the ranks, of frames or positions: equal, or larger by one on the first ranks."""
        return [count // self.size + (rank < count % self.size) for rank in range(self.size)]

    def local(self, frames: int, positions: int) -> tuple[int, int]:
        """Frames, and positions per frame, that this rank has.

        Raises:
            ValueError: there are fewer frames or positions than ranks.
        """
        if min(frames, positions) < self.size:
            raise ValueError(
                f"x: expected at least {self.size} latent frames and positions, one per rank, got "
                f"{frames} frames of {positions}"
            )
        if self.split == "frames":
            return self.sizes(frames)[self.rank], positions
        return frames, self.sizes(positions)[self.rank]

    def part(self, tokens: Tensor, frames: int) -> Tensor:
        """The tokens of this rank, of those of `frames` frames."""
        dimension = 1 if self.split == "frames" else 2
        grid = tokens.unflatten(1, (frames, -1))
        return grid.tensor_split(self.size, dimension)[self.rank].flatten(1, 2)

    def whole(self, tokens: Tensor, frames: int, positions: int) -> Tensor:
        """The tokens of all ranks, of `frames` frames; undoes `part`."""
        count = frames if self.split == "frames" else positions
        dimension = 1 if self.split == "frames" else 2
        sizes = self.sizes(count)
        grid = tokens.unflatten(1, self.local(frames, positions))
        missing = sizes[0] - sizes[self.rank]  # gloo gathers parts of equal sizes
        grid = torch.cat([grid, grid.narrow(dimension, 0, missing)], dimension) if missing else grid
        parts = [torch.empty_like(grid, memory_format=torch.contiguous_format) for _ in sizes]
        dist.all_gather(parts, grid.contiguous(), group=self.group)
        own = [part.narrow(dimension, 0, size) for part, size in zip(parts, sizes, strict=True)]
        return torch.cat(own, dimension).flatten(1, 2)

    def across(
        self, layer: Callable[[Tensor, int], Tensor], tokens: Tensor, frames: int, positions: int
    ) -> Tensor:
        """Runs a layer on tokens that are split the other way.

        Args:
            layer: (tokens, their frames) -> tokens.
            tokens: [B, n, C] of this rank.
            frames, positions: of all ranks.
        """
        if self.split == "frames":
            return self._to_frames(
                layer(self._to_positions(tokens, frames, positions), frames), frames, positions
            )
        seen = self.sizes(frames)[self.rank]
        return self._to_positions(layer(self._to_frames(tokens, frames, positions), seen), frames, positions)

    def _to_positions(self, tokens: Tensor, frames: int, positions: int) -> Tensor:
        """Some frames, all positions -> all frames, some positions."""
        grid = tokens.unflatten(1, (-1, positions))
        own = self.sizes(positions)[self.rank]
        shapes = [(grid.shape[0], count, own, grid.shape[3]) for count in self.sizes(frames)]
        return torch.cat(self._exchanged(grid.tensor_split(self.size, 2), shapes), 1).flatten(1, 2)

    def _to_frames(self, tokens: Tensor, frames: int, positions: int) -> Tensor:
        """All frames, some positions -> some frames, all positions."""
        grid = tokens.unflatten(1, (frames, -1))
        own = self.sizes(frames)[self.rank]
        shapes = [(grid.shape[0], own, count, grid.shape[3]) for count in self.sizes(positions)]
        return torch.cat(self._exchanged(grid.tensor_split(self.size, 1), shapes), 2).flatten(1, 2)

    def _exchanged(self, parts: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """parts[r] goes to rank r; the result's r-th, of shapes[r], comes from rank r."""
        sent = torch.cat([part.flatten() for part in parts])
        sizes = [math.prod(shape) for shape in shapes]
        received = sent.new_empty(sum(sizes))
        dist.all_to_all_single(received, sent, sizes, [part.numel() for part in parts], group=self.group)
        return [one.view(shape) for one, shape in zip(received.split(sizes), shapes, strict=True)]

"""Sequence parallelism of spatial-temporal networks: each rank has some of the frames or of the positions.

Attention over the dimension that is split gets all of it by an all-to-all, which splits the other dimension
instead (DSP, arXiv 2403.10266). Every other layer acts on single tokens."""

from __future__ import annotations

from collections.abc import Callable
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

    def local(self, frames: int, positions: int) -> tuple[int, int]:
        """Frames, and positions per frame, that each rank has.

        Raises:
            ValueError: the ranks cannot have equal parts of both.
        """
        if frames % self.size or positions % self.size:
            raise ValueError(
                f"x: expected latent frames and positions that are multiples of {self.size} ranks, got "
                f"{frames} frames of {positions}"
            )
        return (
            (frames // self.size, positions) if self.split == "frames" else (frames, positions // self.size)
        )

    def part(self, tokens: Tensor, frames: int) -> Tensor:
        """The tokens of this rank, of those of `frames` frames."""
        if self.split == "frames":
            return tokens.chunk(self.size, 1)[self.rank]
        return tokens.unflatten(1, (frames, self.size, -1))[:, :, self.rank].flatten(1, 2)

    def whole(self, tokens: Tensor, frames: int) -> Tensor:
        """The tokens of all ranks, of `frames` frames; undoes `part`."""
        parts = [torch.empty_like(tokens, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, tokens.contiguous(), group=self.group)
        if self.split == "frames":
            return torch.cat(parts, 1)
        return torch.stack([part.unflatten(1, (frames, -1)) for part in parts], 2).flatten(1, 3)

    def across(self, layer: Callable[[Tensor], Tensor], tokens: Tensor, frames: int) -> Tensor:
        """Runs a layer on tokens that are split the other way.

        Args:
            tokens: [B, n, C] of this rank.
            frames: that this rank has.
        """
        if self.split == "frames":
            return self._to_frames(layer(self._to_positions(tokens, frames)), frames * self.size)
        return self._to_positions(layer(self._to_frames(tokens, frames)), frames // self.size)

    def _to_positions(self, tokens: Tensor, frames: int) -> Tensor:
        """Some frames, all positions -> all frames, some positions."""
        grid = tokens.unflatten(1, (frames, self.size, -1)).permute(2, 0, 1, 3, 4)
        return self._exchanged(grid).transpose(0, 1).flatten(1, 3)

    def _to_frames(self, tokens: Tensor, frames: int) -> Tensor:
        """All frames, some positions -> some frames, all positions."""
        grid = tokens.unflatten(1, (self.size, frames // self.size, -1)).transpose(0, 1)
        return self._exchanged(grid).permute(1, 2, 0, 3, 4).flatten(1, 3)

    def _exchanged(self, parts: Tensor) -> Tensor:
        """parts[r] goes to rank r; the result's r-th comes from rank r."""
        parts = parts.contiguous()
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=self.group)
        return received

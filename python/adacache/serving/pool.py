# SPDX-License-Identifier: Apache-2.0
"""The memory of all kept tensors of a server: allocated once, addressed by row."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes; a vector load of the kernels."""


def aligned(size: int) -> int:
    """The bytes that a tensor of `size` bytes takes in a row."""
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass
class Layout:
    """Where the kept tensors of one shape of videos are in a row.

    Attributes:
        places: offset of each tensor, with the shape and dtype of its rows.
        bytes: that are in use.
        dtypes: of features whose policy states none: that of the tokens.
        kept: per kept feature, how often each row was kept.
    """

    places: dict[Hashable, tuple[int, tuple[int, ...], torch.dtype]] = field(default_factory=dict)
    bytes: int = 0
    dtypes: dict[Hashable, torch.dtype] = field(default_factory=dict)
    kept: dict[Hashable, dict[int, int]] = field(default_factory=dict)


class SlotPool:
    """Rows of kept tensors. Videos of one shape share a layout; those of several shapes share the rows.

    Args:
        rows: number of rows; a video takes one per row that it has in the batch.
        row_bytes: of all that is kept for a row.

    Attributes:
        memory: uint8 [rows, row_bytes].
    """

    def __init__(self, rows: int, row_bytes: int, device: torch.device):
        with torch.inference_mode(False):
            self.memory = torch.empty((rows, aligned(row_bytes)), dtype=torch.uint8, device=device)
        self._free = list(range(rows))
        self._layouts: dict[Hashable, Layout] = {}

    @property
    def bytes(self) -> int:
        return self.memory.numel()

    @property
    def free(self) -> int:
        """Number of rows that are free."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Reserves rows and clears them: a residual is first measured against zeros.

        Raises:
            RuntimeError: fewer are free.
        """
        if count > self.free:
            raise RuntimeError(f"slots: {count} rows are needed and {self.free} are free")
        self._free.sort()
        rows, self._free = self._free[:count], self._free[count:]
        for row in rows:
            self.memory[row].zero_()
        return rows

    def give_back(self, rows: Sequence[int]) -> None:
        self._free += rows
        for layout in self._layouts.values():
            for counts in layout.kept.values():
                for row in rows:
                    counts.pop(row, None)

    def layout(self, shape: Hashable) -> Layout:
        """The layout of videos of one shape."""
        return self._layouts.setdefault(shape, Layout())

    def tensor(self, layout: Layout, key: Hashable, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The tensor [rows, *shape] that is kept under a key; placed at its first use.

        Raises:
            RuntimeError: the rows are too short.
        """
        place = layout.places.get(key)
        if place is None or place[1:] != (tuple(shape), dtype):
            size = aligned(prod(shape) * dtype.itemsize)
            if layout.bytes + size > self.memory.shape[1]:
                raise RuntimeError(
                    f"slots: {layout.bytes + size} bytes per row are needed, the pool was allocated with "
                    f"{self.memory.shape[1]}; pass the largest job and all policies to Engine"
                )
            place = layout.places[key] = layout.bytes, tuple(shape), dtype
            layout.bytes += size
        offset = place[0]
        part = self.memory[:, offset : offset + prod(shape) * dtype.itemsize]
        return part.view(dtype).unflatten(1, tuple(shape))

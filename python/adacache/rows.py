# SPDX-License-Identifier: Apache-2.0
"""Rows of a batch: which of them compute at a step, and how they are gathered and scattered. Small copies
between host and device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Split:
    """The rows of a batch that compute at a site, and those that reuse; built on the host, sent without
    waiting.

    Attributes:
        computing, reusing: rows of the batch, ascending.
        batch: number of rows.
    """

    def __init__(self, computes: Sequence[bool], device: torch.device):
        self.computing = [row for row, compute in enumerate(computes) if compute]
        self.reusing = [row for row, compute in enumerate(computes) if not compute]
        self.batch = len(computes)
        self._device = device
        self._index: Tensor | None = None
        self._reuse: Tensor | None = None
        self._taken: dict[int, tuple[Tensor, Tensor]] = {}
        first = self.computing[0] if self.computing else 0
        consecutive = self.computing == list(range(first, first + len(self.computing)))
        self._slice = slice(first, first + len(self.computing)) if consecutive else None

    @property
    def mixed(self) -> bool:
        """Whether some rows compute and others reuse."""
        return bool(self.computing and self.reusing)

    @property
    def index(self) -> Tensor:
        """int32 [rows that compute], on the device."""
        if self._index is None:
            self._index = to_device(torch.tensor(self.computing, dtype=torch.int32), self._device)
        return self._index

    def part_index(self, parts: int) -> Tensor:
        """int32 [rows that compute * parts]: `index` for tensors in which each row has several parts."""
        if parts == 1:
            return self.index
        within = torch.arange(parts, dtype=torch.int32, device=self._device)
        return (self.index[:, None] * parts + within).flatten()

    @property
    def reuse(self) -> Tensor:
        """bool [B], True for the rows that reuse, on the device."""
        if self._reuse is None:
            reusing = set(self.reusing)
            mask = torch.tensor([row in reusing for row in range(self.batch)])
            self._reuse = to_device(mask, self._device)
        return self._reuse

    def take(self, value: Tensor) -> Tensor:
        """The rows that compute of a tensor whose first dimension is the batch, or holds it as its slowest
        part. Gathered once per tensor."""
        known = self._taken.get(id(value))
        if known is None:
            # The value is held, so that its id stays its own.
            known = self._taken[id(value)] = value, self.rows_of(value)
        return known[1]

    def rows_of(self, value: Tensor) -> Tensor:
        """`take` for a tensor that is modified during the step: gathered anew."""
        if value.shape[0] == self.batch:
            return self._select(value)
        return self._select(value.unflatten(0, (self.batch, -1))).flatten(0, 1)

    def put(self, into: Tensor, value: Tensor) -> Tensor:
        """Writes the rows that compute into a tensor that has all rows."""
        whole, part = into, value
        if into.shape[0] != self.batch:
            whole = into.unflatten(0, (self.batch, -1))
            part = value.unflatten(0, (len(self.computing), -1))
        if self._slice is not None:
            whole[self._slice].copy_(part)
        else:
            whole.index_copy_(0, self.index.long(), part.to(whole.dtype))
        return into

    def of(self, value: Any, sizes: set[int]) -> Any:
        """The rows that compute of a tensor, or of tensors in tuples, lists and dicts.

        Args:
            sizes: first dimensions of tensors that hold the batch; other tensors and values are returned as
                they are.
        """
        if isinstance(value, Tensor):
            return self.take(value) if value.ndim and value.shape[0] in sizes else value
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(self.of(v, sizes) for v in value))
        if isinstance(value, tuple | list):
            return type(value)(self.of(v, sizes) for v in value)
        if isinstance(value, dict):
            return {key: self.of(v, sizes) for key, v in value.items()}
        return value

    def _select(self, value: Tensor) -> Tensor:
        return value[self._slice] if self._slice is not None else value.index_select(0, self.index)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A host tensor on `device`, copied without waiting."""
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


class HostCopy:
    """An asynchronous host copy of a small device tensor; `read` waits for it if it has not arrived."""

    def __init__(self, tensor: Tensor):
        if tensor.is_cuda:
            self._values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._values.copy_(tensor, non_blocking=True)
            self._arrived: torch.cuda.Event | None = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(tensor.device))
        else:
            self._values, self._arrived = tensor.clone(), None

    def read(self) -> Tensor:
        if self._arrived is not None:
            self._arrived.synchronize()
            self._arrived = None
        return self._values

    def row(self, row: int) -> HostRow:
        return HostRow(self, row)


@dataclass(frozen=True)
class HostRow:
    """One row of a `HostCopy`, with the shape of a copy of that row alone."""

    of: HostCopy
    number: int

    def read(self) -> Tensor:
        return self.of.read()[self.number : self.number + 1]

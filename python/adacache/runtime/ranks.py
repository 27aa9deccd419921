# SPDX-License-Identifier: Apache-2.0
"""Processes that run one forward call together: what they measure is added, so that all of them decide alike.

Collectives of `torch.distributed` alone: NCCL on GPUs, gloo on CPUs."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from adacache.checks import refuse

SPLITS = ("tokens", "frames", "positions", "rows", "none")
CONSECUTIVE = ("tokens", "frames")
"""Splits with neighbouring frames on different ranks."""
_DIFFER = {
    "rows": ("rows", "tokens"),
    "frames": ("frames", "tokens"),
    "positions": ("tokens",),
    "tokens": ("tokens",),
}
"""What ranks need not have in common."""
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Parallel:
    """How the ranks of a process group share a forward call.

    Attributes:
        group: a `ProcessGroup` of torch.distributed, or a `DeviceMesh` of one dimension. Its ranks hold the
            parts in the order of the sequence.
        split: what each rank has in the blocks:
            "tokens": consecutive tokens of the frame-major sequence, split inside the model;
            "frames": consecutive latent frames, of which the model's latents are the rank's own;
            "positions": all frames, and a part of the positions in each;
            "rows": other rows: another guidance branch, or other videos beside `fully_shard`. Video k of each
            rank has the same decision, as if its rows were in one batch;
            "none": all tokens, as in tensor parallelism.

    Raises:
        ValueError: an argument does not fit.
    """

    group: Any
    split: str = "tokens"

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            refuse("split", f"one of {list(SPLITS)}", self.split)
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "parallel: torch.distributed is not initialized; call torch.distributed.init_process_group"
            )
        if not isinstance(self.process_group, dist.ProcessGroup):
            refuse("group", "a ProcessGroup or a DeviceMesh of one dimension", self.group)
        if self.rank < 0:
            raise ValueError("group: this process is not one of its ranks")

    @property
    def process_group(self) -> Any:
        dimensions = getattr(self.group, "ndim", None)
        if dimensions is None:
            return self.group
        return self.group.get_group() if dimensions == 1 else None

    @property
    def size(self) -> int:
        return dist.get_world_size(self.process_group)

    @property
    def rank(self) -> int:
        return dist.get_rank(self.process_group)


@dataclass(frozen=True)
class Share:
    """What all ranks have of a measured tensor [b, n, C].

    Attributes:
        elements: elements per row of the batch, of all ranks.
        frames: latent frames; 1 where tokens are not whole frames.
        rows: rows of the batch.
        counts: tokens of each rank along the sequence, where tokens are consecutive; else empty.
    """

    elements: int
    frames: int
    rows: int
    counts: tuple[int, ...] = ()

    @property
    def width(self) -> int:
        """Tokens of one frame."""
        return sum(self.counts) // self.frames


class Ranks:
    """The groups that a process decides with.

    Args:
        parallels: one per dimension of a mesh, such as ("tokens", "rows") for context-parallel guidance
            branches. At most one of them splits the sequence.

    Attributes:
        traffic: collectives so far, and their bytes: "reductions", "reduced bytes" (of one operand),
            "borders", "border bytes" (received), "agreements".

    Raises:
        ValueError: several of them split the sequence.
    """

    def __init__(self, parallels: Sequence[Parallel]):
        self.parallels = tuple(parallels)
        self.traffic: Counter[str] = Counter()
        splits = [one.split for one in self.parallels if one.split not in ("rows", "none")]
        if len(splits) > 1:
            refuse("parallel", "at most one split of the tokens", splits)
        self._sequence = next((one for one in self.parallels if one.split in CONSECUTIVE), None)

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(one.split for one in self.parallels)

    @property
    def consecutive(self) -> bool:
        """Whether neighbouring frames may be on different ranks."""
        return self._sequence is not None

    def total(self, sums: Tensor) -> Tensor:
        """The sums of all ranks. One all-reduce per group, in place."""
        for one in self.parallels:
            self.traffic["reductions"] += 1
            self.traffic["reduced bytes"] += sums.numel() * sums.element_size()
            _together(functools.partial(dist.all_reduce, sums, group=one.process_group))
        return sums

    def share(self, x: Tensor, rows: int, frames: int, alike: Mapping[str, int]) -> Share:
        """What all ranks have of a tensor; once per request and site, because it waits for the device.

        Args:
            x: [b, n, C].
            rows: of the batch.
            frames: latent frames that this rank knows of.
            alike: numbers by name that all ranks must have.

        Raises:
            ValueError: ranks disagree; on all of them alike.
        """
        tokens, elements = x.shape[1], x[0].numel() * x.shape[0] // rows if rows else 0
        counts: tuple[int, ...] = ()
        for one in self.parallels:
            own = {**alike, "channels": x.shape[2], "rows": rows, "frames": frames, "tokens": tokens}
            names = [*own, "elements"]
            by_rank = self._gathered([*own.values(), elements], x.device, one)
            by_name = dict(zip(names, zip(*by_rank, strict=True), strict=True))
            for name in own:
                if len(set(by_name[name])) > 1 and name not in _DIFFER.get(one.split, ()):
                    refuse("parallel", f"the same {name} on all ranks", list(by_name[name]))
            if one.split == "rows":
                rows = sum(by_name["rows"])
                elements = sum(n * of for n, of in zip(by_name["elements"], by_name["rows"], strict=True))
                elements //= rows
            else:
                elements = sum(by_name["elements"])
            if one is self._sequence:
                counts = by_name["tokens"]
                frames = sum(by_name["frames"]) if one.split == "frames" else frames
        whole = sum(counts) if counts else tokens
        return Share(elements, 1 if whole % frames else frames, rows, counts)

    def _gathered(self, own: Sequence[int], device: torch.device, one: Parallel) -> list[list[int]]:
        """The numbers of each rank."""
        self.traffic["agreements"] += 1
        mine = torch.tensor(own, dtype=torch.int64).to(device)
        every = torch.empty(one.size, len(own), dtype=torch.int64, device=device)
        _together(lambda: dist.all_gather(list(every.unbind(0)), mine, group=one.process_group))
        found: list[list[int]] = every.tolist()
        return found

    def before(self, x: Tensor, share: Share, reach: int) -> Tensor:
        """The tokens of other ranks before those of this rank.

        Args:
            x: [b, n, C], of this rank.
            reach: tokens needed before each token of x.

        Returns:
            [b, h, C], h <= reach: all that there are.
        """
        sequence = self._sequence
        assert sequence is not None
        group, rank = sequence.process_group, sequence.rank
        edges = [0, *itertools.accumulate(share.counts)]
        begin = edges[rank]
        first = max(0, begin - reach)
        border = x.new_empty(x.shape[0], begin - first, x.shape[2])
        received: list[tuple[slice, Tensor]] = []
        operations = []
        for other in range(sequence.size):
            peer = dist.get_global_rank(group, other)
            if other < rank and max(edges[other], first) < edges[other + 1]:
                low, high = max(edges[other], first), edges[other + 1]
                part = x.new_empty(x.shape[0], high - low, x.shape[2])
                received.append((slice(low - first, high - first), part))
                operations.append(dist.P2POp(dist.irecv, part, peer, group))
            needed = max(0, edges[other] - reach)
            if other > rank and max(needed, begin) < edges[rank + 1]:
                part = x[:, max(needed, begin) - begin :].contiguous()
                operations.append(dist.P2POp(dist.isend, part, peer, group))
        if operations:
            _together(lambda: [work.wait() for work in dist.batch_isend_irecv(operations)])
        for place, part in received:
            border[:, place] = part
        self.traffic["borders"] += len(received)
        self.traffic["border bytes"] += border.numel() * border.element_size()
        return border


def _together(run: Callable[[], _Result]) -> _Result:
    """Runs a collective.

    Raises:
        RuntimeError: a rank does not take part.
    """
    try:
        return run()
    except RuntimeError as error:
        raise RuntimeError(
            "parallel: a rank of the group has stopped, or did not reach this decision within the timeout of "
            f"torch.distributed.init_process_group: {error}"
        ) from error

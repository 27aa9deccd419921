"""What a policy is asked, and what it is told about the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class StackInfo:
    """A model's block stack as a policy sees it."""

    depth: int
    """Blocks (block pairs, where spatial and temporal blocks alternate)."""
    parts: tuple[str, ...]
    """Sub-layers whose residual can be measured."""
    kinds: dict[str, tuple[str, ...]]
    """Per part, the kinds of block of a pair that have it, in the order they run."""
    default_part: str = "temporal_attention"
    """What is measured unless the policy says otherwise."""


@dataclass(frozen=True)
class MetricSite:
    """A place where a residual is measured: one sub-layer of one block."""

    block: int
    kind: str
    part: str

    def __str__(self) -> str:
        return f"{self.kind}_blocks.{self.block}.{self.part}".removeprefix("_")


class Schedule(Protocol):
    """A policy at work on one request. Steps count from 1."""

    sites: tuple[MetricSite, ...]
    """Sites whose residual must be measured at each computed step, in the order they run."""

    def computes(self, step: int) -> list[bool]:
        """Per video, whether this step runs the block stack. Asked once a step, before anything runs."""

    def measured(self, site: int, step: int, sums: Tensor, *, frames: int, elements: float) -> None:
        """Takes the metric sums [decisions, columns] of a site at a computed step, without waiting for
        them."""

    def measurements(self) -> list[dict[str, Any]]:
        """All measurements so far, as records of the trace (waits for the device)."""

    @property
    def strides(self) -> tuple[int, ...]:
        """Frame strides at which motion is measured."""

    @property
    def metric(self) -> str:
        """Distance: "l1", "l2" or "cosine"."""


class Policy(Protocol):
    """Immutable settings; every request gets a schedule of its own."""

    @property
    def cache(self) -> str:
        """What is kept: "stack" (one residual for the whole stack) or "sublayer" (one for each sub-layer)."""

    @property
    def cache_dtype(self) -> torch.dtype | None:
        """Storage of the kept residuals; None: the dtype of the tokens."""

    @property
    def per_video(self) -> bool:
        """Whether each video of a batch is decided on its own."""

    def check(self, num_steps: int, stack: StackInfo) -> None:
        """Raises ValueError if these settings do not fit the schedule or the model."""

    def start(self, num_steps: int, num_videos: int, stack: StackInfo, device: torch.device) -> Schedule:
        """The schedule of a new request; `num_videos` is 1 where one decision holds for the whole batch."""

    def describe(self) -> dict[str, Any]:
        """The settings, for the trace."""


def forced(step: int, num_steps: int) -> bool:
    """The first and the last two steps are always computed (published AdaCache)."""
    return step == 1 or step >= num_steps - 1


def check_steps(num_steps: int) -> None:
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"num_steps: expected a whole number of at least 1, got {num_steps!r}")


def check_blocks(blocks: Sequence[int], depth: int) -> None:
    if not blocks:
        raise ValueError("metric_blocks: expected at least one block, got none")
    for block in blocks:
        if not 0 <= block < depth:
            raise ValueError(f"metric_blocks: expected blocks in 0..{depth - 1}, got {block}")
    if list(blocks) != sorted(set(blocks)):
        raise ValueError(f"metric_blocks: expected ascending blocks without repeats, got {list(blocks)}")

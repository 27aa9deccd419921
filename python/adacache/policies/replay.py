"""The schedule of an earlier run again, whatever the input."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from adacache.checks import array, whole
from adacache.policies.base import MetricSite, StackInfo, check_steps
from adacache.trace import Trace


class Replay:
    """Computes exactly the steps that a trace computed, per video.

    Args:
        trace: a `Trace`, or the 1-based computed steps themselves, for every video.
        cache, cache_dtype: what is kept, as for `AdaCache`.

    Raises:
        ValueError: steps that do not rise from 1, or lie outside the schedule (when a request starts).
    """

    def __init__(
        self, trace: Trace | Sequence[int], *, cache: str = "stack", cache_dtype: torch.dtype | None = None
    ) -> None:
        if isinstance(trace, Trace):
            self.num_steps: int | None = trace.num_steps
            self.computed = [trace.steps_of(video) for video in range(trace.num_videos)]
        else:
            self.num_steps = None
            steps = list(trace) if isinstance(trace, Iterable) else trace
            self.computed = [array(whole(1), least=1)(steps, "trace")]
        for steps in self.computed:
            if not steps or steps[0] != 1 or steps != sorted(set(steps)):
                raise ValueError(f"trace: expected computed steps that rise from 1, got {steps}")
        self.cache = cache
        self.cache_dtype = cache_dtype

    @property
    def per_video(self) -> bool:
        return len(self.computed) > 1

    def check(self, num_steps: int, stack: StackInfo) -> None:
        check_steps(num_steps)
        if self.num_steps not in (None, num_steps):
            raise ValueError(f"num_steps: the trace has {self.num_steps} steps, got {num_steps}")
        last = max(steps[-1] for steps in self.computed)
        if last > num_steps:
            raise ValueError(f"num_steps: the trace computes step {last}, got a schedule of {num_steps}")

    def start(
        self, num_steps: int, num_videos: int, stack: StackInfo, device: torch.device
    ) -> ReplaySchedule:
        self.check(num_steps, stack)
        if self.num_steps is None:
            return ReplaySchedule(self.computed * num_videos)
        if num_videos != len(self.computed):
            raise ValueError(f"num_videos: the trace has {len(self.computed)} videos, got {num_videos}")
        return ReplaySchedule(self.computed)

    def describe(self) -> dict[str, Any]:
        return {"policy": "Replay", "computed": self.computed, "cache": self.cache}


class ReplaySchedule:
    """A fixed schedule at work on one request; it measures nothing."""

    sites: tuple[MetricSite, ...] = ()
    strides: tuple[int, ...] = ()
    metric = "l1"

    def __init__(self, computed: list[list[int]]):
        self._computed = [set(steps) for steps in computed]

    def computes(self, step: int) -> list[bool]:
        return [step in steps for steps in self._computed]

    def measured(self, site: int, step: int, sums: Tensor, *, frames: int, elements: float) -> None:
        raise AssertionError("a replayed schedule measures nothing")

    def measurements(self) -> list[dict[str, Any]]:
        return []

# SPDX-License-Identifier: Apache-2.0
"""Replays the schedule of an earlier run, whatever the input."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from adacache.checks import array, whole
from adacache.policies.base import (
    Action,
    Decider,
    Keep,
    Plan,
    Step,
    check_dtype,
    check_steps,
    check_storage,
)
from adacache.sites import ModelSites
from adacache.trace import Trace


class Replay:
    """Computes exactly the steps that a trace computed, per video.

    Args:
        trace: a `Trace`, or the 1-based computed steps themselves, for every video.
        cache, cache_dtype: what is stored, as for `AdaCache`.

    Raises:
        ValueError: the steps do not ascend from 1, or lie outside the schedule (when a request starts).
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
        check_dtype(cache_dtype)
        self.cache = cache
        self.cache_dtype = cache_dtype

    @property
    def per_video(self) -> bool:
        return len(self.computed) > 1

    def check(self, sites: ModelSites, num_steps: int) -> None:
        check_steps(num_steps)
        check_storage(self.cache, sites)
        if self.num_steps not in (None, num_steps):
            raise ValueError(f"num_steps: the trace has {self.num_steps} steps, got {num_steps}")
        last = max(steps[-1] for steps in self.computed)
        if last > num_steps:
            raise ValueError(f"num_steps: the trace computes step {last}, got a schedule of {num_steps}")

    def start(
        self, sites: ModelSites, num_steps: int, num_videos: int, device: torch.device
    ) -> ReplayDecider:
        self.check(sites, num_steps)
        if self.num_steps is not None and num_videos != len(self.computed):
            raise ValueError(f"num_videos: the trace has {len(self.computed)} videos, got {num_videos}")
        computed = self.computed * num_videos if self.num_steps is None else self.computed
        return ReplayDecider(self, sites, computed)

    def describe(self) -> dict[str, Any]:
        return {"policy": "Replay", "computed": self.computed, "cache": self.cache}


class ReplayDecider(Decider):
    """A fixed schedule at work on one request."""

    def __init__(self, policy: Replay, sites: ModelSites, computed: list[list[int]]):
        self.keeps = {sites.stack: Keep(storage=policy.cache, dtype=policy.cache_dtype)}
        self._stack = sites.stack
        self._computed = [set(steps) for steps in computed]

    def known(self, number: int) -> list[bool | None]:
        return [number in steps for steps in self._computed]

    def plan(self, step: Step) -> Plan:
        return Plan(
            {
                self._stack: [
                    Action.COMPUTE if step.number in steps else Action.REUSE for steps in self._computed
                ]
            }
        )

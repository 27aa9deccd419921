# SPDX-License-Identifier: Apache-2.0
"""Fixed interval: computes every N-th step and reuses the last computed one in between. The baseline that
each adaptive method has to beat."""

from __future__ import annotations

from dataclasses import dataclass

from adacache.checks import whole
from adacache.policies.base import Step
from adacache.policies.scheduled import Scheduled


@dataclass(frozen=True)
class Interval(Scheduled):
    """Computes every `interval`-th step.

    Attributes:
        interval: every interval-th step is computed.
        first: number of steps at the start that are computed.
        last: number of steps at the end that are computed.
        phase: step i (from 1) after the first steps is computed if (i - first - phase) % interval == 0.
        cache, parts, cache_dtype: see `Scheduled`.
    """

    interval: int = 5
    first: int = 1
    last: int = 0
    phase: int = 0

    forecasts = False

    def __post_init__(self) -> None:
        whole(1)(self.interval, "interval")
        whole(1)(self.first, "first")
        whole(0)(self.last, "last")
        whole(0)(self.phase, "phase")
        if self.phase >= self.interval:
            raise ValueError(f"phase: expected 0..{self.interval - 1} with this interval, got {self.phase}")
        super().__post_init__()

    def computes(self, step: Step) -> bool:
        i = step.number
        at_an_end = i <= self.first or i > step.num_steps - self.last
        return at_an_end or (i - self.first - self.phase) % self.interval == 0

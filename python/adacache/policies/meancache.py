# SPDX-License-Identifier: Apache-2.0
"""MeanCache (arXiv 2601.19961): for flow-matching models, the kept velocity is corrected with the average
velocity that the sampler's path shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from adacache.checks import array, number, whole
from adacache.policies.base import MOST_KEPT, Recurrence, Step
from adacache.policies.scheduled import Scheduled
from adacache.sites import ModelSites

Weights = dict[int, float]
"""A linear combination of kept tensors."""


@dataclass(frozen=True)
class MeanCache(Scheduled):
    """At a skipped step at time s, the velocity is v + (s - t) * (z_t - z_r - (t - r) * v_r) / (t - r)^2,
    where v is the output of the model at the last computed step t, and v_r that at the computed step r,
    `span` computed steps before it. z_t - z_r is the sum of the velocities used from r to t, each times its
    step in time, as an Euler sampler adds them up.

    Attributes:
        computed: the computed steps, ascending from 1. The paper takes those with the smallest sum of
            cost^gamma, gamma 4 to 5: `paths.shortest(cost**gamma, len(computed))`.
        span: computed steps from r to t; nearer to the start, all that there are. With 1, the correction is
            0: between two computed steps, the path of an Euler sampler shows no other velocity.
        times: time of each step, such as the scheduler's sigmas; None: equally spaced.
        cache: "branch" or "guided" (see `Scheduled`). With guidance, the path is that of the guided output.
        cache_dtype: see `Scheduled`.

    2 * span tensors are kept, of the size of the latents.
    """

    computed: Sequence[int]
    span: int = 2
    times: Sequence[float] | None = None
    cache: str = field(default="guided", kw_only=True)

    def __post_init__(self) -> None:
        computed = array(whole(1), least=1)(list(self.computed), "computed")
        if computed[0] != 1 or computed != sorted(set(computed)):
            raise ValueError(f"computed: expected steps that rise from 1, got {computed}")
        object.__setattr__(self, "computed", tuple(computed))
        whole(1, MOST_KEPT // 2)(self.span, "span")
        if self.times is not None:
            times = array(number(), least=1)(list(self.times), "times")
            if len(set(times)) != len(times) or times not in (sorted(times), sorted(times, reverse=True)):
                raise ValueError(f"times: expected times that rise or fall, got {times}")
            object.__setattr__(self, "times", tuple(float(time) for time in times))
        if self.cache not in ("branch", "guided"):
            raise ValueError(
                f"cache: expected 'branch' or 'guided', because velocities are, got {self.cache!r}"
            )
        super().__post_init__()

    def check(self, sites: ModelSites, num_steps: int) -> None:
        super().check(sites, num_steps)
        if self.computed[-1] > num_steps:
            raise ValueError(
                f"num_steps: the path computes step {self.computed[-1]}, got a schedule of {num_steps}"
            )
        if self.times is not None and len(self.times) not in (num_steps, num_steps + 1):
            raise ValueError(f"times: expected {num_steps}, one per step, got {len(self.times)}")

    def computes(self, step: Step) -> bool:
        return step.number in self.computed

    def factors(self) -> int:
        return 2 * self.span

    # The kept tensors: 0 .. span-1 are the last velocities, the newest first; span is the correction per unit
    # of time; those after it are the displacements between computed steps, the newest first.

    def recurrence(self, num_steps: int) -> Recurrence:
        def update(kept: Sequence[int], step: int) -> list[list[float]]:
            if not kept:
                return [[] for _ in range(2 * self.span - 1)]
            moved = self._moved(kept[-1], step)
            span = min(self.span, len(kept))
            elapsed = self._time(step) - self._time(kept[-span])
            change = _sum(moved, {self.span + 1 + i: 1.0 for i in range(span - 1)}, {span - 1: -elapsed})
            correction = {i: weight / elapsed**2 for i, weight in change.items()}
            rows: list[Weights] = [{i: 1.0} for i in range(self.span - 1)]
            rows.append(correction)
            rows += [moved if i == 0 else {self.span + i: 1.0} for i in range(self.span - 1)]
            return [[0.0, *(row.get(i, 0.0) for i in range(2 * self.span))] for row in rows]

        return update

    def weights(self, computed: Sequence[int], step: Step) -> list[float]:
        found = self._velocity(computed[-1], step.number)
        return [found.get(i, 0.0) for i in range(2 * self.span)]

    def _velocity(self, last: int, step: int) -> Weights:
        return {0: 1.0, self.span: self._time(step) - self._time(last)}

    def _moved(self, last: int, step: int) -> Weights:
        """z at a step minus z at the computed step `last` before it."""
        parts = []
        for at in range(last, step):
            length = self._time(at + 1) - self._time(at)
            parts.append({i: weight * length for i, weight in self._velocity(last, at).items()})
        return _sum(*parts)

    def _time(self, step: int) -> float:
        return float(step) if self.times is None else self.times[step - 1]


def _sum(*parts: Weights) -> Weights:
    total: Weights = {}
    for part in parts:
        for i, weight in part.items():
            total[i] = total.get(i, 0.0) + weight
    return total

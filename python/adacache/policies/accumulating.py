# SPDX-License-Identifier: Apache-2.0
"""Methods that add up a signal step by step and compute when the sum reaches a threshold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from adacache.policies.base import Action, Decider, Plan, Step, measurement
from adacache.sites import Site


class Accumulating(Decider):
    """A decider that computes when a sum of changes reaches a threshold, per video.

    Args:
        threshold: of the sum; computing sets it to 0.
        num_videos: decisions.
        first, last: numbers of steps at the start and at the end that are computed.
        most: the most skipped steps in a row; None: any number.
    """

    def __init__(
        self, threshold: float, num_videos: int, *, first: int = 1, last: int = 1, most: int | None = None
    ):
        self._threshold = threshold
        self._first = first
        self._end = last
        self._most = most
        self._sums = [0.0] * num_videos
        self._skipped = [0] * num_videos
        self._records: list[dict[str, Any]] = []

    def plan(self, step: Step) -> Plan:
        return Plan()

    def skips(self, step: Step, changes: Sequence[float], name: str) -> list[bool]:
        """Adds the change of each video and decides this step; `name` is that of the signal in the trace. A
        change that is not finite computes."""
        if step.number > 1:
            self._records.append(measurement(step, name, changes))
        at_an_end = step.number <= self._first or step.number > step.num_steps - self._end
        skipped = []
        for video, change in enumerate(changes):
            self._sums[video] += change
            own = (
                not at_an_end
                and math.isfinite(self._sums[video])
                and self._sums[video] < self._threshold
                and not (self._most is not None and self._skipped[video] >= self._most)
            )
            self._skipped[video] = self._skipped[video] + 1 if own else 0
            if not own:
                self._sums[video] = 0.0
            skipped.append(own)
        return skipped

    def overruled(self, step: Step, site: Site, videos: Sequence[int]) -> None:
        for video in videos:
            self._sums[video], self._skipped[video] = 0.0, 0

    def records(self) -> list[dict[str, Any]]:
        return self._records


def actions(skipped: Sequence[bool], skip: Action = Action.REUSE) -> list[Action]:
    """The actions of videos that skip or compute."""
    return [skip if own else Action.COMPUTE for own in skipped]

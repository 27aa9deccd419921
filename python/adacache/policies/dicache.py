# SPDX-License-Identifier: Apache-2.0
"""DiCache (arXiv 2508.17356): the first blocks run at every step as a probe; it decides, and it aligns the
forecast of the other blocks' residual."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adacache.checks import number, text, whole
from adacache.policies.accumulating import Accumulating, actions
from adacache.policies.base import (
    Action,
    Keep,
    Plan,
    Step,
    Sums,
    Watch,
    What,
    check_dtype,
    check_steps,
    columns_of,
    described,
    history,
    relative_changes,
)
from adacache.rows import to_device
from adacache.sites import TOKENS, ModelSites, Site

LEAST, MOST = 1.0, 1.5
"""Bounds of the alignment g."""


@dataclass(frozen=True)
class DiCache:
    """Adds up |change of the probe's output - change of its input|, both relative L1 changes since the step
    before. While the sum is below the threshold, the residual of the other blocks is R'' + g * (R' - R''),
    with R' and R'' the last two computed ones, g = mean|p - p''| / mean|p' - p''| clipped to 1 .. 1.5, and p,
    p', p'' the residuals of the probe at this step and at those two. Else the step is computed and the sum
    starts at 0.

    Attributes:
        threshold: of the sum. Published for FLUX: 0.08 with error="difference"; 0.4 with error="probe" and
            the first fifth of the steps computed. For video models, choose by measuring.
        probe: first blocks, which always run (published: 1).
        error: "difference" (as above) or "probe" (the change of the probe's output alone).
        first, last: numbers of steps at the start and at the end that are computed.
        cache_dtype: dtype of the two kept residuals; None: that of the tokens.

    The published code adds the forecast residual of all blocks to the input of the stack; here the probe's
    own output is used, and only the residual of the other blocks is forecast. Each step reads a few numbers
    per video from the device, before and after the probe.
    """

    threshold: float
    probe: int = 1
    error: str = "difference"
    first: int = 1
    last: int = 1
    cache_dtype: torch.dtype | None = None

    per_video = True

    def __post_init__(self) -> None:
        number(above=0)(self.threshold, "threshold")
        whole(1)(self.probe, "probe")
        text("difference", "probe")(self.error, "error")
        whole(1)(self.first, "first")
        whole(0)(self.last, "last")
        check_dtype(self.cache_dtype)
        if self.cache_dtype == torch.float8_e4m3fn:
            raise ValueError(
                "cache_dtype: expected float32, bfloat16, float16 or None, because forecasts need more "
                "digits, got float8_e4m3fn"
            )

    def check(self, sites: ModelSites, num_steps: int) -> None:
        check_steps(num_steps)
        if self.probe >= len(sites.blocks):
            raise ValueError(f"probe: expected fewer than {len(sites.blocks)} blocks, got {self.probe}")

    def start(
        self, sites: ModelSites, num_steps: int, num_videos: int, device: torch.device
    ) -> DiCacheDecider:
        self.check(sites, num_steps)
        return DiCacheDecider(self, sites, num_videos, device)

    def describe(self) -> dict[str, Any]:
        return described(self)


class DiCacheDecider(Accumulating):
    """DiCache at work on one request."""

    def __init__(self, policy: DiCache, sites: ModelSites, num_videos: int, device: torch.device):
        super().__init__(policy.threshold, num_videos, first=policy.first, last=policy.last)
        self._policy = policy
        self._device = device
        self._rest = Site(policy.probe, sites.stack.last)
        self._state = Site(0, policy.probe, view="output")
        self._newest = Site(0, policy.probe)
        self._before = Site(0, policy.probe, view="residual before")
        self.keeps = {self._rest: Keep(factors=2, dtype=policy.cache_dtype, recurrence=history)}
        self.signals = {TOKENS: Watch()}
        # In this order: the decision comes before what was measured at computed steps is kept.
        self.watches = {
            self._state: Watch(what=What.OUTPUT),
            self._newest: Watch(until=self._rest),
            self._before: Watch(until=self._rest, age=2),
        }
        self._input = [0.0] * num_videos
        self._skipped_now = [False] * num_videos
        self._computed = [0] * num_videos
        self._apart = [0.0] * num_videos
        """sum|p' - p''| of the last two computed steps."""

    def observe(self, step: Step, site: Site, sums: Sums) -> Plan | None:
        if site == TOKENS:
            self._input = relative_changes(sums)
        elif site == self._state:
            changes = relative_changes(sums)
            if self._policy.error == "difference":
                changes = [abs(own - given) for own, given in zip(changes, self._input, strict=True)]
            self._skipped_now = self.skips(step, changes, "probe")
            return Plan({self._rest: actions(self._skipped_now)})
        elif site == self._newest:
            for video, row in enumerate(columns_of(sums)):
                if not self._skipped_now[video]:
                    self._apart[video] = row["abs_diff"]
                    self._computed[video] += 1
        elif any(self._skipped_now):
            return self._forecast(columns_of(sums))
        return None

    def overruled(self, step: Step, site: Site, videos: Sequence[int]) -> None:
        super().overruled(step, site, videos)
        for video in videos:
            self._skipped_now[video] = False

    def _forecast(self, rows: list[dict[str, float]]) -> Plan:
        weights = []
        for row, apart, computed in zip(rows, self._apart, self._computed, strict=True):
            g = row["abs_diff"] / apart if computed > 1 and apart > 0 else LEAST
            g = min(MOST, max(LEAST, g))
            weights.append([g, 1 - g])
        return Plan(
            {self._rest: actions(self._skipped_now, Action.FORECAST)},
            {self._rest: to_device(torch.tensor(weights, dtype=torch.float32), self._device)},
        )

# SPDX-License-Identifier: Apache-2.0
"""TeaCache (arXiv 2411.19108): the change of the timestep-modulated input of the first block, through a
fitted polynomial, estimates the change of the output."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from adacache.checks import array, number, whole
from adacache.policies.accumulating import Accumulating, actions
from adacache.policies.base import (
    Keep,
    Plan,
    Step,
    Sums,
    Watch,
    What,
    check_dtype,
    check_steps,
    check_storage,
    described,
    relative_changes,
)
from adacache.sites import MODULATED, ModelSites, Site
from adacache.trace import Trace

OPEN_SORA = (217.546007, -118.329252, 26.8662585, -0.0459364272, 0.048442624)
"""Published coefficients for Open-Sora, highest power first."""


@dataclass(frozen=True)
class TeaCache:
    """Adds up poly(mean|m - m'| / mean|m'|), where m is the modulated input of the first block and m' that of
    the step before. While the sum is below the threshold, the residual of the stack is reused; else the step
    is computed and the sum starts at 0.

    Attributes:
        coefficients: of the polynomial, highest power first; (1, 0) takes the change as it is. `teacache.fit`
            fits them to a trace of `TeaCacheChanges`.
        threshold: published: 0.1 (slow) and 0.2 (fast).
        first, last: numbers of steps at the start and at the end that are computed (published: 1 and 1).
        cache: "stack" or "block".
        cache_dtype: dtype of the kept residual; None: that of the tokens.

    Each step reads one number per video from the device, before the first block. The published code decides
    for the whole batch, here each video decides.
    """

    coefficients: Sequence[float] = (1.0, 0.0)
    threshold: float = 0.1
    first: int = 1
    last: int = 1
    cache: str = "stack"
    cache_dtype: torch.dtype | None = None

    per_video = True

    def __post_init__(self) -> None:
        coefficients = array(number(), least=1)(list(self.coefficients), "coefficients")
        object.__setattr__(self, "coefficients", tuple(float(one) for one in coefficients))
        number(above=0)(self.threshold, "threshold")
        whole(1)(self.first, "first")
        whole(0)(self.last, "last")
        check_dtype(self.cache_dtype)

    def check(self, sites: ModelSites, num_steps: int) -> None:
        check_steps(num_steps)
        check_storage(self.cache, sites)
        check_modulated(sites)

    def start(
        self, sites: ModelSites, num_steps: int, num_videos: int, device: torch.device
    ) -> TeaCacheDecider:
        self.check(sites, num_steps)
        return TeaCacheDecider(self, sites, num_videos)

    def describe(self) -> dict[str, Any]:
        return described(self)


PRESETS = {
    "teacache/open-sora-slow": TeaCache(OPEN_SORA, 0.1),
    "teacache/open-sora-fast": TeaCache(OPEN_SORA, 0.2),
}


class TeaCacheDecider(Accumulating):
    """TeaCache at work on one request."""

    def __init__(self, policy: TeaCache, sites: ModelSites, num_videos: int):
        super().__init__(policy.threshold, num_videos, first=policy.first, last=policy.last)
        self._coefficients = np.asarray(policy.coefficients)
        self._stack = sites.stack
        self.keeps = {sites.stack: Keep(storage=policy.cache, dtype=policy.cache_dtype)}
        self.signals = {MODULATED: Watch()}

    def observe(self, step: Step, site: Site, sums: Sums) -> Plan:
        rescaled = [
            float(np.polyval(self._coefficients, change)) if math.isfinite(change) else change
            for change in relative_changes(sums)
        ]
        return Plan({self._stack: actions(self.skips(step, rescaled, "modulated input"))})


@dataclass(frozen=True)
class TeaCacheChanges:
    """Computes all steps and measures what `fit` needs: per step the change of the modulated input and that
    of the tokens after the last block. Each step waits for the device."""

    per_video = True

    def check(self, sites: ModelSites, num_steps: int) -> None:
        check_steps(num_steps)
        check_modulated(sites)

    def start(
        self, sites: ModelSites, num_steps: int, num_videos: int, device: torch.device
    ) -> TeaCacheChangesDecider:
        self.check(sites, num_steps)
        return TeaCacheChangesDecider(sites, num_videos)

    def describe(self) -> dict[str, Any]:
        return described(self)


class TeaCacheChangesDecider(Accumulating):
    """The measurement of one request."""

    def __init__(self, sites: ModelSites, num_videos: int):
        super().__init__(1.0, num_videos, first=1 << 30)
        self.keeps = {sites.stack: Keep()}
        self.signals = {MODULATED: Watch()}
        self.watches = {sites.stack: Watch(what=What.OUTPUT)}

    def observe(self, step: Step, site: Site, sums: Sums) -> None:
        self.skips(step, relative_changes(sums), "input" if site == MODULATED else "output")


def fit(*traces: Trace, degree: int = 4) -> tuple[float, ...]:
    """The coefficients of TeaCache's polynomial, by least squares over all steps and videos.

    Args:
        traces: of runs with `TeaCacheChanges`.
        degree: of the polynomial (published: 4).

    Raises:
        ValueError: fewer than degree + 1 points.
    """
    points: dict[str, list[float]] = {"input": [], "output": []}
    for site, values in points.items():
        for trace in traces:
            for video in range(trace.num_videos):
                values += [value for _, value in trace.series("distance", video).get(site, [])]
    if len(points["input"]) != len(points["output"]) or len(points["input"]) <= degree:
        raise ValueError(
            f"traces: expected more than {degree} steps measured by TeaCacheChanges, "
            f"got {len(points['input'])}"
        )
    return tuple(float(one) for one in np.polyfit(points["input"], points["output"], degree))


def check_modulated(sites: ModelSites) -> None:
    """Raises ValueError if the modulated input of the first block cannot be measured."""
    if not sites.blocks[0].outputs:
        raise ValueError(
            "model: its declaration names no sub-layer of the first block, so the modulated input of that "
            "cannot be measured"
        )

# SPDX-License-Identifier: Apache-2.0
"""DBCache (Dual Block Cache of cache-dit): the first blocks run at every step as a probe, the last ones at
every step as a correction; if the probe's residual changed little, the blocks between them are reused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adacache.checks import number, whole
from adacache.policies.base import (
    MOST_FACTORS,
    Action,
    Decider,
    Keep,
    Plan,
    Step,
    Sums,
    Watch,
    check_dtype,
    check_steps,
    described,
    measurement,
    relative_changes,
)
from adacache.policies.taylorseer import taylor_weights
from adacache.rows import to_device
from adacache.sites import ModelSites, Site


@dataclass(frozen=True)
class DBCache:
    """Reuses the blocks between probe and tail if mean|r - r_c| / mean|r_c| < threshold, r the residual of
    the probe, r_c that of the last step that computed them.

    Attributes:
        probe: first blocks, which always run (Fn; published: 8).
        tail: last blocks, which always run (Bn; published: 0).
        threshold: relative L1 change (published: 0.08).
        first: number of steps at the start that are computed (warm-up; published: 8).
        order: 0 reuses the residual, 1 to 3 forecast it as `TaylorSeer` does.
        cache_dtype: dtype of the kept residual; None: that of the tokens.

    Each step reads one number per video from the device, after the probe: the method needs it there.
    """

    probe: int = 8
    tail: int = 0
    threshold: float = 0.08
    first: int = 8
    order: int = 0
    cache_dtype: torch.dtype | None = None

    per_video = True

    def __post_init__(self) -> None:
        whole(1)(self.probe, "probe")
        whole(0)(self.tail, "tail")
        number(above=0)(self.threshold, "threshold")
        whole(1)(self.first, "first")
        whole(0, MOST_FACTORS - 1)(self.order, "order")
        check_dtype(self.cache_dtype)
        if self.order > 0 and self.cache_dtype == torch.float8_e4m3fn:
            raise ValueError(
                "cache_dtype: expected float32, bfloat16, float16 or None with order > 0, got float8_e4m3fn"
            )

    def check(self, sites: ModelSites, num_steps: int) -> None:
        check_steps(num_steps)
        if self.probe + self.tail >= len(sites.blocks):
            raise ValueError(
                f"probe, tail: expected fewer than {len(sites.blocks)} blocks together, "
                f"got {self.probe} + {self.tail}"
            )

    def start(
        self, sites: ModelSites, num_steps: int, num_videos: int, device: torch.device
    ) -> DBCacheDecider:
        self.check(sites, num_steps)
        return DBCacheDecider(self, sites, num_videos, device)

    def describe(self) -> dict[str, Any]:
        return described(self)


PRESETS = {"dbcache/f8b0": DBCache(), "dbcache/f1b0": DBCache(probe=1)}


class DBCacheDecider(Decider):
    """DBCache at work on one request."""

    def __init__(self, policy: DBCache, sites: ModelSites, num_videos: int, device: torch.device):
        self._policy = policy
        self._videos = num_videos
        self._device = device
        self._probe = Site(0, policy.probe)
        self._rest = Site(policy.probe, sites.stack.last - policy.tail)
        self._name = sites.name(self._probe)
        self._last = [1] * num_videos
        self.keeps = {self._rest: Keep(factors=policy.order + 1, dtype=policy.cache_dtype)}
        self.watches = {self._probe: Watch(until=self._rest)}
        self._records: list[dict[str, Any]] = []

    def plan(self, step: Step) -> Plan:
        return Plan()

    def observe(self, step: Step, site: Site, sums: Sums) -> Plan:
        distances = relative_changes(sums)
        if step.number == 1:
            return Plan()
        warm = step.number <= self._policy.first
        reused = [not warm and distance < self._policy.threshold for distance in distances]  # no NaN
        self._records.append(measurement(step, self._name, distances))
        self._last = [last if reuse else step.number for last, reuse in zip(self._last, reused, strict=True)]
        skip = Action.FORECAST if self._policy.order else Action.REUSE
        actions = {self._rest: [skip if reuse else Action.COMPUTE for reuse in reused]}
        if skip is Action.REUSE or not any(reused):
            return Plan(actions)
        weights = [taylor_weights(self._policy.order, step.number - last) for last in self._last]
        return Plan(
            actions, {self._rest: to_device(torch.tensor(weights, dtype=torch.float32), self._device)}
        )

    def overruled(self, step: Step, site: Site, videos: Sequence[int]) -> None:
        for video in videos:
            self._last[video] = step.number

    def records(self) -> list[dict[str, Any]]:
        return self._records

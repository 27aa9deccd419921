# SPDX-License-Identifier: Apache-2.0
"""BWCache (arXiv 2509.13789): when the outputs of all blocks have changed little on average, the blocks are
reused for a fixed number of steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adacache.checks import number
from adacache.policies.accumulating import actions
from adacache.policies.base import (
    Decider,
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
    measurement,
)
from adacache.rows import HostCopy
from adacache.sites import ModelSites, Site
from adacache_kernels import sum_columns


@dataclass(frozen=True)
class BWCache:
    """After a computed step at which the mean over all blocks of the relative L1 change of the block's
    output, since the computed step before, is below the threshold, the next `share` of all steps reuse the
    residual of the stack. If this happens first with k steps to go (the step itself included), the last k / 2
    steps are computed.

    Attributes:
        threshold: published: 0.15.
        share: of the steps, at least one (published: 0.1).
        cache: "stack" or "block" (published); both give the same output, "stack" keeps one tensor.
        cache_dtype: dtype of the kept residuals; None: that of the tokens.

    The old output of each block is kept for the measurement: as many tensors as blocks. Nothing waits for the
    device: a decision is read one step later.
    """

    threshold: float = 0.15
    share: float = 0.1
    cache: str = "stack"
    cache_dtype: torch.dtype | None = None

    per_video = True

    def __post_init__(self) -> None:
        number(above=0)(self.threshold, "threshold")
        number(0, 1)(self.share, "share")
        check_dtype(self.cache_dtype)

    def check(self, sites: ModelSites, num_steps: int) -> None:
        check_steps(num_steps)
        check_storage(self.cache, sites)

    def start(
        self, sites: ModelSites, num_steps: int, num_videos: int, device: torch.device
    ) -> BWCacheDecider:
        self.check(sites, num_steps)
        return BWCacheDecider(self, sites, num_videos)

    def describe(self) -> dict[str, Any]:
        return described(self)


PRESETS = {"bwcache/video": BWCache()}


class BWCacheDecider(Decider):
    """BWCache at work on one request."""

    def __init__(self, policy: BWCache, sites: ModelSites, num_videos: int):
        self._policy = policy
        self._stack = sites.stack
        self.keeps = {sites.stack: Keep(storage=policy.cache, dtype=policy.cache_dtype)}
        self.watches = {Site(i, i + 1): Watch(what=What.OUTPUT) for i in range(len(sites.blocks))}
        self._measured: list[HostCopy] = []
        self._computing = list(range(num_videos))
        self._left = [0] * num_videos
        """Steps that a video still reuses."""
        self._first: list[int | None] = [None] * num_videos
        """Steps to go when a video first reused."""
        self._records: list[dict[str, Any]] = []

    def plan(self, step: Step) -> Plan:
        before = Step(step.number - 1, step.num_steps)
        if self._measured:
            self._decide(before)
        to_go = step.num_steps - step.number + 1
        skipped = []
        for video, left in enumerate(self._left):
            first = self._first[video]
            skip = left > 0 and not (first is not None and to_go <= first / 2)
            self._left[video] = left - 1 if skip else 0
            skipped.append(skip)
        self._computing = [video for video, skip in enumerate(skipped) if not skip]
        return Plan({self._stack: actions(skipped)})

    def _decide(self, step: Step) -> None:
        """Reads what was measured at the step before."""
        columns = sum_columns(())
        old, new = columns.index("abs_old"), columns.index("abs_diff")
        tables = [copy.read() for copy in self._measured]
        self._measured = []
        means = [math.inf] * len(self._left)
        for video in self._computing:
            rows = [table[video].tolist() for table in tables]
            changes = [row[new] / row[old] if row[old] else math.inf for row in rows]
            means[video] = sum(changes) / len(changes)
            if means[video] < self._policy.threshold:
                self._left[video] = max(1, int(self._policy.share * step.num_steps))
                if self._first[video] is None:
                    self._first[video] = step.num_steps - step.number + 1
        if step.number > 1:
            self._records.append(measurement(step, "all blocks", means))

    def overruled(self, step: Step, site: Site, videos: Sequence[int]) -> None:
        self._computing += videos
        for video in videos:
            self._left[video] = 0

    def observe(self, step: Step, site: Site, sums: Sums) -> None:
        self._measured.append(HostCopy(sums.values))

    def records(self) -> list[dict[str, Any]]:
        return self._records

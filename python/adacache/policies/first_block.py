"""First-block cache (FBCache): the first block runs at every step; if its residual changed little, the cached
residual of all other blocks is reused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import adacache_kernels
from adacache.checks import number
from adacache.policies.base import (
    Action,
    Decider,
    Keep,
    Plan,
    Step,
    Sums,
    Watch,
    check_dtype,
    check_steps,
    dtype_name,
)
from adacache.sites import ModelSites, Site


@dataclass(frozen=True)
class FirstBlock:
    """Reuses blocks 2..L if mean|r - r_c| / mean|r_c| < threshold, r the residual of block 1, r_c that of the
    last computed step.

    Attributes:
        threshold: relative L1 change; published values are .05 to .08.
        cache_dtype: dtype of the kept residual; None: that of the tokens.

    Each step reads one number per video from the device, after the first block: the method needs it there.
    """

    threshold: float = 0.08
    cache_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        number(above=0)(self.threshold, "threshold")
        check_dtype(self.cache_dtype)

    per_video = True

    def check(self, sites: ModelSites, num_steps: int) -> None:
        check_steps(num_steps)
        if len(sites.blocks) < 2:
            raise ValueError("model: FirstBlock needs a model of at least two blocks")

    def start(
        self, sites: ModelSites, num_steps: int, num_videos: int, device: torch.device
    ) -> FirstBlockDecider:
        self.check(sites, num_steps)
        return FirstBlockDecider(self, sites, num_videos)

    def describe(self) -> dict[str, Any]:
        return {
            "policy": "FirstBlock",
            "threshold": self.threshold,
            "cache_dtype": dtype_name(self.cache_dtype),
        }


class FirstBlockDecider(Decider):
    """First-block cache at work on one request."""

    def __init__(self, policy: FirstBlock, sites: ModelSites, num_videos: int):
        self._threshold = policy.threshold
        self._videos = num_videos
        self._probe = Site(0, 1)
        self._rest = Site(1, sites.stack.last)
        self._name = sites.name(self._probe)
        self.keeps = {self._rest: Keep(dtype=policy.cache_dtype)}
        self.watches = {self._probe: Watch(until=self._rest)}
        self._records: list[dict[str, Any]] = []

    def plan(self, step: Step) -> Plan:
        return Plan()

    def observe(self, step: Step, site: Site, sums: Sums) -> Plan:
        columns = adacache_kernels.sum_columns(sums.strides)
        rows = [dict(zip(columns, row, strict=True)) for row in sums.values.tolist()]
        distances = [row["abs_diff"] / row["abs_old"] if row["abs_old"] else float("inf") for row in rows]
        if step.number == 1:
            return Plan()
        reused = [distance < self._threshold for distance in distances]  # False for NaN: compute
        unmeasured = [None] * self._videos
        self._records.append(
            {
                "step": step.number,
                "site": self._name,
                "distance": [d if abs(d) < float("inf") else None for d in distances],
                "motion": unmeasured,
                "factor": unmeasured,
                "rate": unmeasured,
                "nonfinite": [not abs(d) < float("inf") for d in distances],
            }
        )
        return Plan({self._rest: [Action.REUSE if reuse else Action.COMPUTE for reuse in reused]})

    def records(self) -> list[dict[str, Any]]:
        return self._records

# SPDX-License-Identifier: Apache-2.0
"""EasyCache (arXiv 2507.02860): the output of the model follows its input with a rate that is measured during
the run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from adacache.checks import number, whole
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
    columns_of,
    described,
)
from adacache.sites import LATENTS, MODEL, ModelSites, Site


@dataclass(frozen=True)
class EasyCache:
    """Adds up k * mean|x - x'| / mean|y'|, with x the latents, x' those of the step before, y' the last
    computed output of the model, and k = mean|change of y| / mean|change of x| between the last two computed
    steps. While the sum is below the threshold, the output is x plus the last computed (output - latents);
    else the step is computed and the sum starts at 0.

    Attributes:
        threshold: published: 0.05 (Wan), 0.025 (HunyuanVideo).
        first, last: numbers of steps at the start and at the end that are computed (published: 10 and 1, for
            HunyuanVideo 5 and 1).
        cache_dtype: dtype of the kept difference; None: that of the output.

    The model is not called at skipped steps. Each step reads one number from the device before the model
    runs; the batch has one decision. A model whose output has another shape than its latents is refused.
    """

    threshold: float = 0.05
    first: int = 10
    last: int = 1
    cache_dtype: torch.dtype | None = None

    wraps = "model"
    per_video = False

    def __post_init__(self) -> None:
        number(above=0)(self.threshold, "threshold")
        whole(2)(self.first, "first")
        whole(0)(self.last, "last")
        check_dtype(self.cache_dtype)

    def check(self, sites: ModelSites, num_steps: int) -> None:
        check_steps(num_steps)

    def start(
        self, sites: ModelSites, num_steps: int, num_videos: int, device: torch.device
    ) -> EasyCacheDecider:
        self.check(sites, num_steps)
        return EasyCacheDecider(self, num_videos)

    def describe(self) -> dict[str, Any]:
        return described(self)


PRESETS = {"easycache/wan": EasyCache(), "easycache/hunyuan": EasyCache(0.025, first=5)}


class EasyCacheDecider(Accumulating):
    """EasyCache at work on one request."""

    def __init__(self, policy: EasyCache, num_videos: int):
        super().__init__(policy.threshold, num_videos, first=policy.first, last=policy.last)
        self.keeps = {MODEL: Keep(What.RESIDUAL, dtype=policy.cache_dtype)}
        self.watches = {MODEL: Watch(what=What.OUTPUT)}
        self._since = replace(LATENTS, view="since the last computed step")
        self.signals = {LATENTS: Watch(), self._since: Watch(until=MODEL)}
        self._moved = 0.0
        self._rate = float("inf")
        self._size = 0.0

    def observe(self, step: Step, site: Site, sums: Sums) -> Plan | None:
        (row,) = columns_of(sums)
        if site == self._since:
            self._moved = row["abs_diff"]
        elif site == MODEL:
            # The first computed step has nothing to compare with.
            if row["abs_old"] > 0 and self._moved > 0:
                self._rate = row["abs_diff"] / self._moved
            self._size = row["abs_new"]
        else:
            change = self._rate * row["abs_diff"] / self._size if self._size else float("inf")
            return Plan({MODEL: actions(self.skips(step, [change], "latents"))})
        return None

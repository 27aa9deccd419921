"""TaylorSeer (arXiv 2503.06923): computes every N-th step and forecasts the others by a Taylor expansion over
the step index."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adacache.checks import whole
from adacache.policies.base import (
    MOST_FACTORS,
    Action,
    Decider,
    Keep,
    Plan,
    Step,
    What,
    check_dtype,
    check_parts,
    check_steps,
    check_storage,
    dtype_name,
)
from adacache.rows import to_device
from adacache.sites import ModelSites

CACHES = ("stack", "block", "output")


@dataclass(frozen=True)
class TaylorSeer:
    """Forecasts a feature x steps after a computed one as sum over i of F_i * x^i / i!, where F_0 is the
    feature and F_(i+1) = (F_i - F_i at the computed step before) / steps between the two.

    Attributes:
        interval: every interval-th step is computed (published for video: 5).
        order: of the expansion, 0 (plain reuse) to 3 (published for video: 1).
        first: number of steps at the start that are computed (published for video: 1).
        last: number of steps at the end that are computed (published: 0).
        phase: step i (from 1) after the first steps is computed if (i - first - phase) % interval == 0
            (published: 0).
        cache: the features: "stack" (the residual of the whole stack), "block" (that of each block) or
            "output" (the outputs of sub-layers, as published; the blocks run at all steps).
        parts: with cache="output", the sub-layers; None: all.
        cache_dtype: dtype of the kept factors; None: that of the features.

    `diffusers.TaylorSeerCacheConfig` has the schedule first=disable_cache_before_step,
    interval=cache_interval, phase=2 % interval."""

    interval: int = 5
    order: int = 1
    first: int = 1
    last: int = 0
    phase: int = 0
    cache: str = "stack"
    parts: Sequence[str] | None = None
    cache_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        whole(1)(self.interval, "interval")
        whole(0, MOST_FACTORS - 1)(self.order, "order")
        whole(1)(self.first, "first")
        whole(0)(self.last, "last")
        whole(0)(self.phase, "phase")
        if self.phase >= self.interval:
            raise ValueError(f"phase: expected 0..{self.interval - 1} with this interval, got {self.phase}")
        if self.cache not in CACHES:
            raise ValueError(f"cache: expected one of {list(CACHES)}, got {self.cache!r}")
        if self.parts is not None:
            if self.cache != "output":
                raise ValueError(f"parts: expected None with cache={self.cache!r}, got {self.parts!r}")
            object.__setattr__(self, "parts", check_parts("parts", self.parts))
        check_dtype(self.cache_dtype)
        if self.cache_dtype == torch.float8_e4m3fn:
            raise ValueError(
                "cache_dtype: expected float32, bfloat16, float16 or None, because factors of a forecast "
                "need more digits, got float8_e4m3fn"
            )

    per_video = False

    def check(self, sites: ModelSites, num_steps: int) -> None:
        check_steps(num_steps)
        if self.cache != "output":
            check_storage(self.cache, sites)
            return
        known = sites.output_parts
        if not known:
            raise ValueError("cache: this model declares no sub-layers, so 'output' is not supported")
        unknown = [part for part in self.parts or () if part not in known]
        if unknown:
            raise ValueError(f"parts: expected some of the model's sub-layers {list(known)}, got {unknown}")

    def start(
        self, sites: ModelSites, num_steps: int, num_videos: int, device: torch.device
    ) -> TaylorSeerDecider:
        self.check(sites, num_steps)
        return TaylorSeerDecider(self, sites, num_videos, device)

    def computes(self, step: Step) -> bool:
        """Whether a step is computed."""
        i = step.number
        at_an_end = i <= self.first or i > step.num_steps - self.last
        return at_an_end or (i - self.first - self.phase) % self.interval == 0

    def describe(self) -> dict[str, Any]:
        names = ("interval", "order", "first", "last", "phase", "cache")
        return {
            "policy": "TaylorSeer",
            **{name: getattr(self, name) for name in names},
            "parts": None if self.parts is None else list(self.parts),
            "cache_dtype": dtype_name(self.cache_dtype),
        }


class TaylorSeerDecider(Decider):
    """TaylorSeer at work on one request."""

    def __init__(self, policy: TaylorSeer, sites: ModelSites, num_videos: int, device: torch.device):
        self._policy = policy
        self._videos = num_videos
        self._device = device
        self._computed = 0
        factors, dtype = policy.order + 1, policy.cache_dtype
        if policy.cache == "output":
            parts = sites.output_parts if policy.parts is None else policy.parts
            found = [site for part in parts for site in sites.outputs(part)]
            self.keeps = dict.fromkeys(found, Keep(What.OUTPUT, factors=factors, dtype=dtype))
        else:
            self.keeps = {sites.stack: Keep(storage=policy.cache, factors=factors, dtype=dtype)}

    def plan(self, step: Step) -> Plan:
        if self._policy.computes(step):
            self._computed = step.number
            return Plan()
        ahead = step.number - self._computed
        weights = [ahead**k / math.factorial(k) for k in range(self._policy.order + 1)]
        rows = torch.tensor([weights] * self._videos, dtype=torch.float32)
        return Plan(
            dict.fromkeys(self.keeps, [Action.FORECAST] * self._videos),
            dict.fromkeys(self.keeps, to_device(rows, self._device)),
        )

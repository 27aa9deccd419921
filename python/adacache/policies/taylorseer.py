"""TaylorSeer (arXiv 2503.06923): computes every N-th step and forecasts the others by a Taylor expansion over
the step index."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adacache.policies.base import (
    Action,
    Decider,
    Keep,
    Plan,
    Step,
    check_count,
    check_dtype,
    check_steps,
    check_storage,
)
from adacache.sites import ModelSites

MOST_FACTORS = 4
"""What `adacache_kernels.extrapolate_residual` takes."""


@dataclass(frozen=True)
class TaylorSeer:
    """Forecasts the residual x steps after a computed one as sum over i of F_i * x^i / i!, where F_0 is the
    residual and F_(i+1) = (F_i - F_i at the computed step before) / steps between the two.

    Attributes:
        interval: every interval-th step is computed (published for video: 5).
        order: of the expansion, 0 (plain reuse) to 3 (published for video: 1).
        first: steps at the start that are computed in full (published for video: 1).
        cache: "stack" forecasts the residual of the whole stack, "block" that of each block.
        cache_dtype: dtype of the kept factors; None: that of the tokens.
    """

    interval: int = 5
    order: int = 1
    first: int = 1
    cache: str = "stack"
    cache_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        check_count("interval", self.interval)
        check_count("order", self.order, 0)
        check_count("first", self.first)
        if self.order >= MOST_FACTORS:
            raise ValueError(f"order: expected 0..{MOST_FACTORS - 1}, got {self.order}")
        check_dtype(self.cache_dtype)
        if self.cache_dtype == torch.float8_e4m3fn:
            raise ValueError("cache_dtype: factors of a forecast cannot be float8_e4m3fn")

    per_video = False

    def check(self, sites: ModelSites, num_steps: int) -> None:
        check_steps(num_steps)
        check_storage(self.cache, sites)
        if self.cache == "sublayer":
            raise ValueError("cache: expected 'stack' or 'block', got 'sublayer'")

    def start(
        self, sites: ModelSites, num_steps: int, num_videos: int, device: torch.device
    ) -> TaylorSeerDecider:
        self.check(sites, num_steps)
        return TaylorSeerDecider(self, sites, num_videos, device)

    def describe(self) -> dict[str, Any]:
        names = ("interval", "order", "first", "cache")
        return {"policy": "TaylorSeer", **{name: getattr(self, name) for name in names}}


class TaylorSeerDecider(Decider):
    """TaylorSeer at work on one request."""

    def __init__(self, policy: TaylorSeer, sites: ModelSites, num_videos: int, device: torch.device):
        self._policy = policy
        self._stack = sites.stack
        self._videos = num_videos
        self._device = device
        self._computed: list[int] = []
        self.keeps = {
            sites.stack: Keep(storage=policy.cache, factors=policy.order + 1, dtype=policy.cache_dtype)
        }

    def plan(self, step: Step) -> Plan:
        policy, i = self._policy, step.number
        if i <= policy.first or (i - policy.first) % policy.interval == 0:
            self._computed.append(i)
            return Plan()
        known = min(policy.order, len(self._computed) - 1)
        ahead = i - self._computed[-1]
        weights = [ahead**k / math.factorial(k) if k <= known else 0.0 for k in range(policy.order + 1)]
        coefficients = torch.tensor([weights] * self._videos, dtype=torch.float32)
        return Plan(
            {self._stack: [Action.FORECAST] * self._videos},
            {self._stack: _sent(coefficients, self._device)},
        )


def _sent(values: Tensor, device: torch.device) -> Tensor:
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)

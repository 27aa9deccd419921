# SPDX-License-Identifier: Apache-2.0
"""TaylorSeer (arXiv 2503.06923): computes every N-th step and forecasts the others by a Taylor expansion over
the step index."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from adacache.checks import whole
from adacache.policies.base import MOST_FACTORS, Step
from adacache.policies.interval import Interval


def taylor_weights(order: int, ahead: int) -> list[float]:
    """The weights of a feature and its divided differences, `ahead` steps after it was computed."""
    return [ahead**k / math.factorial(k) for k in range(order + 1)]


@dataclass(frozen=True)
class TaylorSeer(Interval):
    """Forecasts a feature x steps after a computed one as sum over i of F_i * x^i / i!, where F_0 is the
    feature and F_(i+1) = (F_i - F_i at the computed step before) / steps between the two.

    Attributes:
        order: of the expansion, 0 (plain reuse) to 3 (published for video: 1).
        interval, first, last, phase: see `Interval` (published for video: 5, 1, 0, 0).
        cache, parts, cache_dtype: see `Scheduled` (published: "output").

    `diffusers.TaylorSeerCacheConfig` has the schedule first=disable_cache_before_step,
    interval=cache_interval, phase=2 % interval."""

    order: int = 1

    forecasts = True

    def __post_init__(self) -> None:
        whole(0, MOST_FACTORS - 1)(self.order, "order")
        super().__post_init__()

    def factors(self) -> int:
        return self.order + 1

    def weights(self, computed: Sequence[int], step: Step) -> list[float]:
        return taylor_weights(self.order, step.number - computed[-1])


PRESETS = {"taylorseer/video": TaylorSeer(cache="output")}

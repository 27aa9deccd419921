# SPDX-License-Identifier: Apache-2.0
"""FoCa (arXiv 2508.16211): computes every N-th step; a forecast is corrected by the slope at the last
computed step (Heun's rule) and goes through the forecasts before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adacache.checks import whole
from adacache.policies.base import Recurrence, Step
from adacache.policies.interval import Interval


@dataclass(frozen=True)
class FoCa(Interval):
    """Forecasts a feature k steps after a computed one as F + k/2 * ((F - F_prev) + (V - V_prev)), with F and
    F_prev the last two computed features, and V and V_prev the values of the last two steps, computed or
    forecast. Before there are two computed features, F is reused.

    Attributes:
        horizon: beyond this many steps, k is replaced by horizon^2 / k; None: never, as in the paper.
            cache-dit has 3.
        interval, first, last, phase: see `Interval`.
        cache, parts, cache_dtype: see `Scheduled`.

    F - F_prev is not divided by the steps between the two, as in cache-dit. Three tensors are kept per
    feature: F, F_prev, and the value before F.
    """

    horizon: int | None = None

    forecasts = True

    def __post_init__(self) -> None:
        if self.horizon is not None:
            whole(1)(self.horizon, "horizon")
        super().__post_init__()

    def factors(self) -> int:
        return 3

    def recurrence(self, num_steps: int) -> Recurrence:
        def update(kept: Sequence[int], step: int) -> list[list[float]]:
            if not kept:
                return [[], []]
            # F_prev is the old F, and V_prev at the new step is the value of the step before.
            return [[0.0, 1.0], [0.0, *self._value(len(kept), step - 1 - kept[-1])]]

        return update

    def weights(self, computed: Sequence[int], step: Step) -> list[float]:
        return self._value(len(computed), step.number - computed[-1])

    def _value(self, computed: int, ahead: int) -> list[float]:
        """The value `ahead` steps after a computed one, as weights of F, F_prev and the value before F."""
        value, before = [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]
        if computed < 2:
            return value
        slope = [1.0, -1.0, 0.0]
        for k in range(1, ahead + 1):
            reach = k if self.horizon is None or k <= self.horizon else self.horizon**2 / k
            new = [
                start + reach / 2 * (own + a - b)
                for start, own, a, b in zip([1.0, 0.0, 0.0], slope, value, before, strict=True)
            ]
            value, before = new, value
        return value

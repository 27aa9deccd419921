# SPDX-License-Identifier: Apache-2.0
"""Spectrum (arXiv 2603.01623): features are forecast by a ridge fit of Chebyshev polynomials over the step
index, and windows of skipped steps grow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adacache.checks import number, whole
from adacache.policies.base import MOST_KEPT, Recurrence, Step
from adacache.policies.scheduled import Scheduled


@dataclass(frozen=True)
class Spectrum(Scheduled):
    """Forecasts a feature as sum over k <= degree of c_k * T_k(t), where t is the step scaled to -1 .. 1 and
    the c_k minimise sum |F_j - sum c_k T_k(t_j)|^2 + ridge * sum |c_k|^2 over all computed steps j.

    Attributes:
        degree: of the polynomials (published: 4).
        ridge: weight of the penalty (published: 0.1).
        first: number of steps at the start that are computed (published: 5).
        window, growth: after the first steps, the n-th computed step comes floor(window + (n - 1) * growth)
            steps after the one before. Published: 2 and 0.75 (14 of 50 steps), or 2 and 3 (10 of 50 steps).
        cache, parts, cache_dtype: see `Scheduled`.

    The fit is linear in the features, so running sums of T_k(t_j) * F_j replace the history: degree + 2
    tensors are kept per feature, however many steps are computed. The published mixture with a Taylor
    forecast is not included.
    """

    degree: int = 4
    ridge: float = 0.1
    first: int = 5
    window: float = 2.0
    growth: float = 0.75

    def __post_init__(self) -> None:
        whole(0, MOST_KEPT - 2)(self.degree, "degree")
        number(above=0)(self.ridge, "ridge")
        whole(1)(self.first, "first")
        number(1)(self.window, "window")
        number(0)(self.growth, "growth")
        super().__post_init__()

    def computes(self, step: Step) -> bool:
        due, window = self.first, self.window
        while due < step.number:
            due, window = due + int(window), window + self.growth
        return step.number <= self.first or due == step.number

    def factors(self) -> int:
        return self.degree + 2  # the newest feature, for steps that reuse it, and the sums

    def recurrence(self, num_steps: int) -> Recurrence:
        def update(kept: Sequence[int], step: int) -> list[list[float]]:
            basis = self._basis([step], num_steps)[0].tolist()
            return [[weight, *[0.0] * (k + 1), 1.0] for k, weight in enumerate(basis)]

        return update

    def weights(self, computed: Sequence[int], step: Step) -> list[float]:
        known, wanted = self._basis(computed, step.num_steps), self._basis([step.number], step.num_steps)
        gram = known.T @ known + self.ridge * np.eye(self.degree + 1)
        fitted: list[float] = np.linalg.solve(gram, wanted[0]).tolist()
        return [0.0, *fitted]

    def _basis(self, steps: Sequence[int], num_steps: int) -> NDArray[np.float64]:
        """T_0 .. T_degree at steps: [steps, degree + 1]."""
        t = 2 * (np.asarray(steps, dtype=np.float64) - 1) / max(1, num_steps - 1) - 1
        basis = np.polynomial.chebyshev.chebvander(t, self.degree).astype(np.float64)
        return basis


PRESETS = {"spectrum/slow": Spectrum(), "spectrum/fast": Spectrum(growth=3.0)}
"""14 and 10 of 50 steps."""

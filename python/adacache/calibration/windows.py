# SPDX-License-Identifier: Apache-2.0
"""The error that a window of skipped steps causes in the final latents, from recorded outputs alone.

In a window (h, i, j), i and j are consecutive computed steps and h is the one before i; a skipped step k has
the output F_i + factor (k - i) / (i - h) (F_i - F_h) in place of F_k. To first order this changes the final
latents by A + factor B, with

    A = sum over k of s_k (F_i - F_k),    B = sum over k of s_k (k - i) / (i - h) (F_i - F_h)

where s_k is the sensitivity: the change of the final latents per change of the output of step k.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adacache.calibration.paths import shortest_with_memory

Doubles = NDArray[np.float64]

MOST_FACTOR = 3.0
"""Factors of single windows are between 0 and this."""
DRAWS, SPREAD, MOST_WORSE = 200, 0.6, 2.0
"""For `Windows.paths`: random changes of the cost, their standard deviation in logarithms, and the largest
ratio to the smallest cost."""


RIDGE = 0.05
"""Default of `Windows.joint_factors`."""


def longest_window(num_steps: int, least: int) -> int:
    """`Windows.longest` for paths of at least `least` computed steps."""
    return min(num_steps, max(13, math.ceil(3 * num_steps / least)))


@dataclass(frozen=True)
class Windows:
    """All windows of a schedule.

    Attributes:
        outputs: [P, N, D] of P clips, projected to D dimensions.
        sensitivity: [N].
        longest: most skipped steps of a window, plus 1.
    """

    outputs: Doubles
    sensitivity: Doubles
    longest: int

    @property
    def num_steps(self) -> int:
        return int(self.outputs.shape[1])

    def terms(self, h: int, i: int, j: int) -> tuple[Doubles, Doubles]:
        """A and B of a window, [P, D] each; h < 0: there is no earlier step, and B is 0."""
        skipped = np.arange(i + 1, j)
        s, at = self.sensitivity[skipped], self.outputs[:, i]
        error = s.sum() * at - np.einsum("k,pkd->pd", s, self.outputs[:, skipped])
        if h < 0:
            return error, np.zeros_like(error)
        slope = (at - self.outputs[:, h]) / (i - h)
        return error, (s * (skipped - i)).sum() * slope

    def factor(self, h: int, i: int, j: int) -> float:
        """The factor with the smallest error of a window by itself, in 0 .. `MOST_FACTOR`."""
        return _factor(*self.terms(h, i, j))

    def cost(self) -> Doubles:
        """Mean squared error of each window with its own factor, [N + 1, N + 1, N + 1] at [h, i, j]; h = N:
        there is no earlier step. inf: the window is longer than `longest`."""
        steps = self.num_steps
        cost = np.full((steps + 1,) * 3, np.inf)
        for i in range(steps):
            for j in range(i + 1, min(i + self.longest, steps) + 1):
                for h in [*range(max(0, i - self.longest), i), *([steps] if i == 0 else [])]:
                    error, slope = self.terms(h if h < steps else -1, i, j)
                    remaining = error + _factor(error, slope) * slope
                    cost[h, i, j] = (remaining**2).sum(1).mean()
        return cost

    def remaining(self, path: Sequence[int], factors: Sequence[float]) -> Doubles:
        """Squared error of the final latents that is expected of a path, per clip [P]."""
        total = np.zeros_like(self.outputs[:, 0])
        for window, factor in zip(path_windows(path, self.num_steps), factors, strict=True):
            error, slope = self.terms(*window)
            total += error + factor * slope
        squares: Doubles = (total**2).sum(1)
        return squares

    def paths(self, cost: Doubles, computed: int, most: int) -> list[list[int]]:
        """Paths of so many computed steps: the one with the smallest sum of squared errors, the best ones
        with another second or another last computed step, and others whose sum is nearly as small. The others
        are the best ones after random changes of the cost; each is at least two steps from all before it.

        The sum is an estimate to first order; of paths with nearly equal sums, runs show the best.
        """
        best, least = shortest_with_memory(cost, computed)
        chosen: list[tuple[int, ...]] = [tuple(best)]
        for changed in _other_ends(cost, best):
            try:
                chosen.append(tuple(shortest_with_memory(changed, computed)[0]))
            except ValueError:  # no such path
                continue
        found: dict[tuple[int, ...], float] = {}
        source = np.random.default_rng(0)
        for _ in range(DRAWS):
            changed = cost * np.exp(SPREAD * source.standard_normal(cost.shape))
            path = shortest_with_memory(changed, computed)[0]
            total = self.total(cost, path)
            if total <= least * MOST_WORSE:
                found[tuple(path)] = total
        for one in sorted(found, key=lambda key: found[key]):
            if all(len(set(one) - set(other)) > 1 for other in chosen):
                chosen.append(one)
        return [list(path) for path in dict.fromkeys(chosen)][:most]

    def total(self, cost: Doubles, path: Sequence[int]) -> float:
        """The sum of the squared errors of a path."""
        return float(sum(cost[window] for window in path_windows(path, self.num_steps)))

    def joint_factors(
        self, path: Sequence[int], ridge: float = RIDGE, known: Sequence[float] = ()
    ) -> list[float]:
        """The factors of all windows of a path, fitted together on the sum of their errors:

        minimizes |sum over w of (A_w + f_w B_w)|^2 + ridge * sum over w of |B_w|^2 (f_w - g_w)^2

        with g_w the factor of window w by itself. One factor per computed step; 0 where nothing is skipped or
        there is no earlier step. `known`: the factors of the first windows, which are not fitted.
        """
        windows = path_windows(path, self.num_steps)
        terms = [self.terms(*window) for window in windows]
        total = np.sum([error for error, _ in terms], axis=0)
        for w, factor in enumerate(known):
            total = total + factor * terms[w][1]
        used = [w for w, (_, slope) in enumerate(terms) if w >= len(known) and np.any(slope)]
        factors = [*known, *[0.0] * (len(path) - len(known))]
        if not used:
            return factors
        slopes = np.stack([terms[w][1].ravel() for w in used])
        alone = np.array([_factor(*terms[w]) for w in used])
        size = (slopes**2).sum(1)
        solved = np.linalg.solve(
            slopes @ slopes.T + ridge * np.diag(size), ridge * size * alone - slopes @ total.ravel()
        )
        for w, value in zip(used, solved, strict=True):
            factors[w] = float(value)
        return factors


def _other_ends(cost: Doubles, best: Sequence[int]) -> list[Doubles]:
    """Costs that forbid the second computed step of a path, allow only later ones, or forbid its last."""
    end = len(cost) - 1
    if len(best) < 3:
        return []
    without_second, next_second, without_last = cost.copy(), cost.copy(), cost.copy()
    without_second[end, 0, best[1]] = np.inf
    next_second[end, 0, : best[1] + 1] = np.inf
    without_last[:, best[-1], end] = np.inf
    return [without_second, next_second, without_last]


def path_windows(path: Sequence[int], num_steps: int) -> list[tuple[int, int, int]]:
    """The windows (h, i, j) of a path, one per computed step; h = -1 for the first."""
    ends = [*path[1:], num_steps]
    return list(zip([-1, *path[:-1]], path, ends, strict=True))


def _factor(error: Doubles, slope: Doubles) -> float:
    size = float((slope**2).sum())
    return float(np.clip(-(error * slope).sum() / size, 0, MOST_FACTOR)) if size else 0.0

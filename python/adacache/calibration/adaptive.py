"""Calibration of adaptive paths: paths of many budgets with a common start, and the error of each as a
function of the guided output at the end of that start."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from adacache.calibration.clips import Clip, cached_run
from adacache.calibration.paths import computing, shortest_with_memory
from adacache.calibration.runs import Subject
from adacache.calibration.windows import Doubles, Windows
from adacache.policies import AdaptivePath, PlannedPath

SHARED = 3
"""Computed steps of the common start."""
PATHS = 11
"""About so many paths, of budgets in equal ratios."""
SHRINK = 1.0
"""Pulls the slopes of the error lines to 0, in units of a clip."""


@dataclass
class Adaptive:
    """What was found.

    Attributes:
        paths: computed steps (from 0) of each path, ascending in their number.
        factors: one per computed step.
        lines: intercept and slope of each path; see `AdaptivePath`.
        prices: by mean budget: the price of a step with which the calibration clips compute so many.
        held_out: by mean budget, (computed steps, PSNR) of each held-out prompt.
    """

    paths: list[list[int]]
    factors: list[list[float]]
    lines: list[tuple[float, float]]
    prices: dict[int, float]
    held_out: dict[int, list[tuple[int, float]]] = field(default_factory=dict)

    def policy(self, budget: int) -> AdaptivePath:
        """The settings of a mean budget."""
        paths = [
            PlannedPath([step + 1 for step in path], factors)
            for path, factors in zip(self.paths, self.factors, strict=True)
        ]
        return AdaptivePath(paths, SHARED, self.lines, self.prices[budget])

    def values(self) -> dict[str, Any]:
        """Of the JSON file."""
        return {
            "shared": SHARED,
            "paths": [
                {
                    "computed": [step + 1 for step in path],
                    "factors": [round(factor, 5) for factor in factors],
                    "line": [round(intercept, 5), round(slope, 5)],
                }
                for path, factors, (intercept, slope) in zip(
                    self.paths, self.factors, self.lines, strict=True
                )
            ],
            "prices": {str(budget): float(f"{price:.6g}") for budget, price in self.prices.items()},
            "held_out": {
                str(budget): {
                    "computed": round(float(np.mean([steps for steps, _ in found])), 2),
                    "mean": round(float(np.mean([psnr for _, psnr in found])), 2),
                    "worst": round(min(psnr for _, psnr in found), 2),
                }
                for budget, found in self.held_out.items()
            },
        }


def calibrate_adaptive(
    subject: Subject,
    clips: Sequence[Clip],
    windows: Windows,
    cost: Doubles,
    start: Sequence[int],
    budgets: Sequence[int],
    ridge: float,
    say: Callable[[str], None],
) -> Adaptive:
    """Finds paths that begin with `start`, and fits their error lines on cached runs of all clips.

    Args:
        cost: of all windows.
        start: the first computed steps, from 0.
        budgets: mean budgets; paths of more and of fewer steps are found too.
        ridge: see `Windows.joint_factors`.

    Raises:
        ValueError: the schedule is too short for paths of several budgets.
    """
    steps = subject.num_steps
    # Without the last step, the error of a path depends more on how it ends than on its number of steps.
    cost = with_start(computing(cost, [steps - 1]), start)
    numbers = path_numbers(min(budgets), max(budgets), steps)
    middle = shortest_with_memory(cost, sorted(budgets)[len(budgets) // 2])[0]
    known = windows.joint_factors(middle, ridge)[: len(start) - 1]
    paths, factors = [], []
    for number in numbers:
        path = shortest_with_memory(cost, number)[0]
        paths.append(path)
        factors.append(windows.joint_factors(path, ridge, known))
    errors = np.empty((len(clips), len(paths)))
    for v, clip in enumerate(clips):
        for k, (path, own) in enumerate(zip(paths, factors, strict=True)):
            change = cached_run(subject, clip, path, own).double() - clip.full.states[-1].double()
            errors[v, k] = max(float((change**2).mean()), 1e-12)
        say(f"adaptive: clip {v + 1} of {len(clips)}, {len(paths)} paths")
    signal = [float((clip.full.outputs[start[-1]].double() ** 2).mean()) for clip in clips]
    lines = error_lines(np.log(signal), np.log(errors))
    predicted = np.exp(np.array([[a + b * math.log(one) for a, b in lines] for one in signal]))
    prices = {
        budget: price_of(predicted, numbers, budget)
        for budget in sorted(budgets, reverse=True)
        if numbers[0] < budget < numbers[-1]
    }
    return Adaptive(paths, factors, lines, prices)


def path_numbers(least: int, most: int, steps: int) -> list[int]:
    """Numbers of computed steps of the paths, in about equal ratios."""
    low, high = min(max(SHARED + 1, round(0.9 * least)), steps), min(most, steps)
    return sorted({round(low * (high / low) ** (k / (PATHS - 1))) for k in range(PATHS)})


def with_start(cost: Doubles, start: Sequence[int]) -> Doubles:
    """The cost of windows [h, i, j] of paths that can only begin with these steps (from 0)."""
    limited = cost.copy()
    for h, i, j in zip([len(cost) - 1, *start[:-2]], start[:-1], start[1:], strict=True):
        kept = limited[h, i, j]
        limited[h, i] = np.inf
        limited[h, i, j] = kept
    return limited


def error_lines(signal: Doubles, errors: Doubles) -> list[tuple[float, float]]:
    """Intercept and slope of each path's line: least squares with shrunk slopes.

    Args:
        signal: [clips]; errors: [clips, paths]; logarithms.
    """
    center = signal.mean()
    moved = signal - center
    spread = float((moved**2).mean())
    slopes = (
        moved @ (errors - errors.mean(0)) / ((moved**2).sum() + SHRINK * spread) if spread else 0 * errors[0]
    )
    return [
        (float(mean - slope * center), float(slope))
        for mean, slope in zip(errors.mean(0), slopes, strict=True)
    ]


def price_of(errors: Doubles, numbers: Sequence[int], mean: float) -> float:
    """The smallest price of a step with which the cheapest paths have at most `mean` computed steps.

    Args:
        errors: predicted, [clips, paths].
        numbers: computed steps of each path.
    """
    counts = np.array(numbers, dtype=np.float64)
    low, high = -60.0, 20.0  # logarithms
    for _ in range(100):
        half = (low + high) / 2
        chosen = (errors + math.exp(half) * counts).argmin(1)
        low, high = (half, high) if counts[chosen].mean() > mean else (low, half)
    return math.exp(high)

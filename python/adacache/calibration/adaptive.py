# SPDX-License-Identifier: Apache-2.0
"""Calibration of adaptive paths: paths of many budgets with a common start, and the error of each as a
function of the guided output at the end of that start."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from adacache.calibration.clips import Clip, cached_run, enabled_run, projected, psnr
from adacache.calibration.paths import computing, shortest_with_memory
from adacache.calibration.runs import Subject
from adacache.calibration.trajectory import networks, trajectory
from adacache.calibration.windows import Doubles, Windows, longest_window
from adacache.checks import array, number, refuse, whole
from adacache.files import write_json
from adacache.interpose import plain_class
from adacache.policies import AdaptivePath, PlannedPath, planned
from adacache.policies.planned_path import check_num_steps, read_paths

SHARED = 2
"""Computed steps of the common start."""
PATHS = 11
"""About this many paths, of budgets in equal ratios."""
SHRINK = 1.0
"""Pulls the slopes of the error lines to 0, in units of a clip."""


@dataclass
class Adaptive:
    """What was found.

    Attributes:
        paths: computed steps (from 0) of each path, ascending in their number.
        factors: one per computed step.
        lines: intercept and slope of each path; see `AdaptivePath`.
        prices: by mean budget: the price of a step with which the calibration clips compute that many.
        held_out: by mean budget and kind ("adaptive", "planned"), (computed steps, PSNR) of each held-out
            prompt.
    """

    paths: list[list[int]]
    factors: list[list[float]]
    lines: list[tuple[float, float]]
    prices: dict[int, float]
    held_out: dict[int, dict[str, list[tuple[int, float]]]] = field(default_factory=dict)

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
                    kind: {
                        "computed": round(float(np.mean([steps for steps, _ in results])), 2),
                        "mean": round(float(np.mean([reached for _, reached in results])), 2),
                        "worst": round(min(reached for _, reached in results), 2),
                    }
                    for kind, results in kinds.items()
                }
                for budget, kinds in self.held_out.items()
            },
        }


def calibrate_adaptive(
    path: str | Path,
    subject: Subject,
    prompts: Sequence[Any],
    held_out: Sequence[Any],
    *,
    seed: int = 0,
    out: str | Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Adaptive:
    """Adds a choice of budgets per video to a file of planned paths.

    Args:
        path: the file; its sensitivity, and the start of the path of its middle budget, are used.
        prompts: on which the errors of all paths are measured, one full run and about three times its cost
            each; 12 or more.
        held_out: prompts on which the result is evaluated, beside the planned paths; may be empty.
        seed: of the first prompt; the next ones count up.
        out: file to write; None: `path`.
        say: gets lines of progress.

    Raises:
        ValueError: no prompt, not such a file, or one of another model, sampler, number of steps or level.
    """
    whole(0)(seed, "seed")
    if not prompts:
        refuse("prompts", "at least one", list(prompts))
    values = read_paths(path)
    _check_subject(path, values, subject)
    budgets = sorted((int(one) for one in values["budgets"]), reverse=True)
    clips = []
    for v, prompt in enumerate(prompts):
        clips.append(Clip(prompt, seed + v, trajectory(subject, prompt, seed + v)))
        say(f"full run {v + 1} of {len(prompts)}")
    longest = longest_window(subject.num_steps, min(budgets))
    windows = Windows(projected(clips), np.array(values["sensitivity"], dtype=np.float64), longest)
    middle = values["budgets"][str(budgets[len(budgets) // 2])]["computed"]
    found = fitted(subject, clips, windows, [step - 1 for step in middle[:SHARED]], budgets, say)
    for v, prompt in enumerate(held_out):
        _evaluate(subject, prompt, seed + len(prompts) + v, path, found)
        say(f"held-out prompt {v + 1} of {len(held_out)}")
    write_json(path if out is None else out, {**values, "adaptive": found.values()})
    return found


def fitted(
    subject: Subject,
    clips: Sequence[Clip],
    windows: Windows,
    start: Sequence[int],
    budgets: Sequence[int],
    say: Callable[[str], None] = lambda line: None,
) -> Adaptive:
    """Finds paths that begin with the computed steps `start` (from 0), and fits their error lines on cached
    runs of all clips."""
    counts = path_counts(min(budgets), max(budgets), subject.num_steps)
    paths, factors = paths_from(windows, start, counts, sorted(budgets)[len(budgets) // 2])
    errors = np.empty((len(clips), len(paths)))
    for v, clip in enumerate(clips):
        for k, (path, own) in enumerate(zip(paths, factors, strict=True)):
            final = cached_run(subject, clip, path, own).states[-1]
            change = final.double() - clip.full.states[-1].double()
            errors[v, k] = max(float((change**2).mean()), 1e-12)
        say(f"errors of {len(paths)} paths: prompt {v + 1} of {len(clips)}")
    signal = [float((clip.full.outputs[start[-1]].double() ** 2).mean()) for clip in clips]
    lines = error_lines(np.log(signal), np.log(errors))
    predicted = np.exp(np.array([[a + b * math.log(one) for a, b in lines] for one in signal]))
    prices = {
        budget: price_of(predicted, counts, budget)
        for budget in sorted(budgets, reverse=True)
        if counts[0] < budget < counts[-1]
    }
    return Adaptive(paths, factors, lines, prices)


def _check_subject(path: str | Path, values: dict[str, Any], subject: Subject) -> None:
    """Raises ValueError unless a file of paths fits the model and its sampler."""
    steps = subject.num_steps
    check_num_steps(path, values, steps)
    array(number(), steps, steps)(values.get("sensitivity"), f"path: {path}: sensitivity")
    found = {
        "level": "guided",
        "model": plain_class(networks(subject.model)[0]).__name__,
        "scheduler": plain_class(subject.sampler).__name__,
    }
    for name, own in found.items():
        if values[name] != own:
            raise ValueError(f"path: {path}: {name}: expected {own!r}, got {values[name]!r}")


def _evaluate(subject: Subject, prompt: Any, seed: int, path: str | Path, found: Adaptive) -> None:
    """Adds the results of a held-out prompt."""
    full = subject.generate(prompt, seed)
    peak = subject.peak or float(full.max() - full.min())
    for budget in found.prices:
        for kind, policy in (("adaptive", found.policy(budget)), ("planned", planned(path, budget=budget))):
            output, steps = enabled_run(subject, policy, prompt, seed)
            results = found.held_out.setdefault(budget, {}).setdefault(kind, [])
            results.append((steps, psnr(output, full, peak)))


def paths_from(
    windows: Windows, start: Sequence[int], counts: Sequence[int], middle: int
) -> tuple[list[list[int]], list[list[float]]]:
    """The best path of each number of computed steps that begins with `start` (from 0) and computes the last
    step, and its factors. The factors within the start are those of the path with `middle` steps."""
    # Without the last step, the error of a path depends more on how it ends than on its number of steps.
    cost = with_start(computing(windows.cost(), [windows.num_steps - 1]), start)
    known = windows.joint_factors(shortest_with_memory(cost, middle)[0])[: len(start) - 1]
    paths = [shortest_with_memory(cost, count)[0] for count in counts]
    return paths, [windows.joint_factors(path, known=known) for path in paths]


def path_counts(least: int, most: int, steps: int) -> list[int]:
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


def price_of(errors: Doubles, counts: Sequence[int], mean: float) -> float:
    """The smallest price of a step with which the cheapest paths have at most `mean` computed steps.

    Args:
        errors: predicted, [clips, paths].
        counts: computed steps of each path.
    """
    low, high = -60.0, 20.0  # logarithms
    for _ in range(100):
        half = (low + high) / 2
        chosen = (errors + math.exp(half) * np.array(counts)).argmin(1)
        low, high = (half, high) if np.array(counts)[chosen].mean() > mean else (low, half)
    return math.exp(high)

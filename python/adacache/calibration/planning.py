# SPDX-License-Identifier: Apache-2.0
"""Calibration of planned paths: which steps to compute, and how far to extrapolate between them.

1. A full run per prompt records the guided outputs and the latents.
2. Sensitivity: in a few runs the output of one step is replaced and the rest is computed, which measures how
   the final latents change. The scheduler alone gives the share of the other steps.
3. The error of each window of skipped steps follows from the recorded outputs; dynamic programming finds the
   best paths of each budget, and linear algebra their factors.
4. Further factors come from cached runs: each window is matched to the latents of the full run at its end.
   The path and the factors that are best on the calibration prompts are chosen; where the scheduler can take
   the path's timesteps alone, without a cache, this is tried too.
5. Each budget is run on held-out prompts through `adacache.enable`, beside sampling with fewer steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adacache.api import disable, enable
from adacache.calibration.clips import Clip, cached_run, decibel, enabled_run, flat, forecast, projected, psnr
from adacache.calibration.runs import Subject
from adacache.calibration.trajectory import Solver, networks, trajectory
from adacache.calibration.windows import RIDGE, Doubles, Windows, longest_window, path_windows
from adacache.checks import refuse, text, whole
from adacache.files import replacing, write_json
from adacache.interpose import plain_class
from adacache.policies import PlannedPath, PlannedTimesteps
from adacache.policies.planned_path import CACHE, FORMAT, LEVELS, TIMESTEPS

SPEEDUPS = (2.0, 2.5, 3.0, 3.75, 5.0)
"""Default budgets are the number of steps over these."""
RIDGES = {"joint": RIDGE, "joint, ridge 0.3": 0.3}
"""Candidates for the factors that need no cached run; see `Windows.joint_factors`."""
REFINE = 12
"""Default number of paths of one budget that are run."""
JOINT_SHARE = 0.4
"""With at least this share of computed steps, paths are compared with the factors that need no cached run."""
NEAR = 4
"""Neighbours of the best path that are run before those of a better one."""
CROP = 8
"""Size of the latents on which a scheduler's coefficients are measured."""
CHANGE = 0.1
"""Change of a factor in a run that measures its effect."""
REPLAY = 1e-3
"""Largest relative difference of a scheduler's steps when they are repeated without the model."""

Say = Callable[[str], None]


@dataclass
class Budget:
    """What was found for one number of computed steps; PSNR in dB, means over clips.

    Attributes:
        path: computed steps, from 0.
        factors: one per computed step.
        fit: how they were fitted.
        use: `CACHE`, or `TIMESTEPS` if sampling at the path's timesteps is better.
        predicted: PSNR of the final latents that the recorded outputs alone predict.
        calibration: PSNR of the final latents of the calibration prompts, per candidate.
        held_out: PSNR per clip of held-out prompts by way of generation: "planned", "fewer steps".
    """

    path: list[int]
    factors: list[float]
    fit: str
    use: str
    predicted: float
    calibration: dict[str, float]
    held_out: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class PathCalibration:
    """All that a calibration found; `write` makes the file of it."""

    subject: Subject
    level: str
    shape: tuple[int, ...]
    timesteps: list[float] | None
    sensitivity: Doubles
    budgets: dict[int, Budget] = field(default_factory=dict)
    seconds: float = 0.0

    def values(self) -> dict[str, Any]:
        """Of the JSON file."""
        subject = self.subject
        model = networks(subject.model)[0]
        return {
            "format": FORMAT,
            "subject": subject.name,
            "model": plain_class(model).__name__,
            "scheduler": plain_class(subject.sampler).__name__,
            "num_steps": subject.num_steps,
            "timesteps": self.timesteps,
            "shape": list(self.shape),
            "level": self.level,
            "seconds": round(self.seconds, 1),
            "sensitivity": [round(float(s), 6) for s in self.sensitivity],
            "budgets": {
                str(number): {
                    "computed": [step + 1 for step in one.path],
                    "factors": [round(factor, 5) for factor in one.factors],
                    "use": one.use,
                    "fit": one.fit,
                    "predicted_psnr": round(one.predicted, 2),
                    "calibration_psnr": {name: round(psnr, 2) for name, psnr in one.calibration.items()},
                    "held_out_psnr": {
                        name: {
                            "mean": round(float(np.mean(psnrs)), 2),
                            "worst": round(float(np.min(psnrs)), 2),
                        }
                        for name, psnrs in one.held_out.items()
                    },
                }
                for number, one in sorted(self.budgets.items(), reverse=True)
            },
        }

    def write(self, path: str | Path) -> None:
        write_json(path, self.values())


def default_budgets(num_steps: int) -> list[int]:
    """Computed steps at about 2, 2.5, 3, 3.75 and 5 times fewer steps."""
    return sorted({max(2, round(num_steps / speedup)) for speedup in SPEEDUPS}, reverse=True)


def calibrate_paths(
    subject: Subject,
    prompts: Sequence[Any],
    held_out: Sequence[Any],
    *,
    budgets: Sequence[int] | None = None,
    level: str = "guided",
    seed: int = 0,
    probed: int | None = None,
    refine: int = REFINE,
    work: str | Path | None = None,
    say: Say = lambda line: None,
) -> PathCalibration:
    """Finds a path and its factors for each budget.

    Args:
        prompts: at least one; three give nearly what twelve do.
        held_out: prompts on which the result is evaluated; may be empty.
        budgets: numbers of computed steps; None: `default_budgets`.
        level: see `PlannedPath`. Factors are fitted on guided outputs; for "stack" they are then fitted anew
            in cached runs, one per factor and prompt.
        seed: of the first prompt; the next ones count up.
        probed: of the prompts, those on which the sensitivity is measured and paths are compared; None: half
            of them.
        refine: paths of one budget that are run; 1: the one that the recorded outputs predict to be best.
        work: folder in which full runs are kept, so that an interrupted calibration goes on.
        say: gets lines of progress.

    Raises:
        ValueError: an argument does not fit, or the sampler is not one loop of a deterministic scheduler.
    """
    began = time.monotonic()
    steps = subject.num_steps
    text(*LEVELS)(level, "level")
    whole(0)(seed, "seed")
    if not prompts:
        refuse("prompts", "at least one", list(prompts))
    chosen = sorted(set(default_budgets(steps) if budgets is None else budgets), reverse=True)
    for number in chosen:
        whole(1, steps)(number, "budgets")
    probed = -(-len(prompts) // 2) if probed is None else probed
    whole(1, len(prompts))(probed, "probed")
    whole(1)(refine, "refine")
    recorder = _Recorder(subject, None if work is None else Path(work))
    clips = []
    for number, prompt in enumerate(prompts):
        clips.append(recorder.clip(prompt, seed + number))
        say(f"full run {number + 1} of {len(prompts)}")
    _check_replay(clips)
    solver = clips[0].full.solver
    coefficients = solver_coefficients(solver, clips[0].start, steps)
    sensitivity = measured_sensitivity(subject, clips[:probed], coefficients, say)
    longest = longest_window(steps, min(chosen))
    windows = Windows(projected(clips), sensitivity, longest)
    say(f"errors of all windows of up to {longest - 1} skipped steps")
    cost = windows.cost()
    found = PathCalibration(subject, level, tuple(clips[0].start.shape[1:]), _timesteps(solver), sensitivity)
    for number in chosen:
        path = _best_path(subject, clips[:probed], windows, cost, number, refine)
        budget = _fit(subject, clips, windows, path)
        if level == "stack":
            _refit(subject, clips[:probed], budget, level)
        found.budgets[number] = budget
        say(
            f"{number} computed steps {[step + 1 for step in budget.path]}: "
            + ", ".join(f"{name} {psnr:.1f} dB" for name, psnr in budget.calibration.items())
        )
    first = seed + len(prompts)
    for number, prompt in enumerate(held_out):
        _evaluate(subject, prompt, first + number, found)
        say(f"held-out prompt {number + 1} of {len(held_out)}")
    found.seconds = time.monotonic() - began
    recorder.done()
    return found


# 1. Full runs.


class _Recorder:
    """Full runs; with a folder, those of an earlier, interrupted calibration are not computed again."""

    def __init__(self, subject: Subject, folder: Path | None):
        self._subject = subject
        self._folder = folder
        self._files: list[Path] = []
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def clip(self, prompt: Any, seed: int) -> Clip:
        subject = self._subject
        if self._folder is None:
            return Clip(prompt, seed, trajectory(subject, prompt, seed))
        file = self._folder / f"run_{seed}.pt"
        self._files.append(file)
        key = f"{subject.name} {subject.num_steps} {prompt}"
        if file.exists():
            kept = torch.load(file, weights_only=True)
            if kept["key"] != key:
                raise ValueError(f"work: {file} is of another calibration ({kept['key']}); remove the folder")
            outputs = kept["outputs"]
            # Step 0 is computed again: it shows the structure of the model's output.
            full = trajectory(
                subject, prompt, seed, given=lambda step, before: outputs[step] if step else None
            )
            return Clip(prompt, seed, full)
        full = trajectory(subject, prompt, seed)
        with replacing(file) as temporary:
            torch.save({"key": key, "outputs": full.outputs}, temporary)
        return Clip(prompt, seed, full)

    def done(self) -> None:
        for file in self._files:
            file.unlink(missing_ok=True)
        if self._folder is not None and not any(self._folder.iterdir()):
            self._folder.rmdir()


def _check_replay(clips: Sequence[Clip]) -> None:
    """Raises ValueError unless a scheduler repeats its steps without the model."""
    full = clips[0].full
    states = full.solver.run(full.states[0], full.outputs)
    difference = _distance(states[-1], full.states[-1]) / float(full.states[-1].float().norm())
    if not difference <= REPLAY:
        raise ValueError(
            f"scheduler: repeating the steps of {type(full.solver.scheduler).__name__} with the recorded "
            f"outputs gives other latents (relative difference {difference:.1e}). The sampler draws noise "
            "without a generator that is passed to each step, or changes latents between steps; such "
            "samplers cannot be calibrated"
        )


# 2. Sensitivity.


def solver_coefficients(solver: Solver, start: Tensor, num_steps: int) -> Doubles:
    """Change of the final latents per change of the output of each step [N], by the scheduler alone."""
    crop = start[(slice(0, 1),) + (slice(0, CROP),) * (start.ndim - 1)]
    source = torch.Generator().manual_seed(0)
    outputs = [torch.randn(crop.shape, generator=source).to(crop.dtype) for _ in range(num_steps)]
    change = torch.randn(crop.shape, generator=source).to(crop.dtype)
    plain = solver.run(crop, outputs)[-1]
    found = np.zeros(num_steps)
    for step in range(num_steps):
        changed = [*outputs[:step], outputs[step] + change, *outputs[step + 1 :]]
        difference = flat(solver.run(crop, changed)[-1]) - flat(plain)
        found[step] = float(difference @ flat(change)) / float(flat(change) @ flat(change))
    return found


def probed_steps(num_steps: int) -> list[int]:
    """Steps (from 0) at which the sensitivity is measured."""
    inner = [round(share * num_steps) for share in (0.3, 0.5, 0.68, 0.84, 0.92)]
    steps = {1, 2, 4, 8, *inner, num_steps - 2}
    return sorted(step for step in steps if 1 <= step < num_steps - 1)


def measured_sensitivity(
    subject: Subject, clips: Sequence[Clip], coefficients: Doubles, say: Say = lambda line: None
) -> Doubles:
    """Change of the final latents per change of the output of each step [N], with the model's reaction to the
    changed latents. Measured at some steps; the ratio to the scheduler's coefficient is interpolated."""
    steps = subject.num_steps
    known = {steps - 1: 0.0}  # after the last step no model reacts
    for step in probed_steps(steps):
        logs = []
        for clip in clips:
            outputs = clip.full.outputs
            before = outputs[step - 1]
            changed = before if step == 1 else before + (before - outputs[step - 2])

            def given(
                at: int, _: Any, step: int = step, outputs: Any = outputs, changed: Any = changed
            ) -> Any:
                return outputs[at] if at < step else changed if at == step else None

            final = clip.run(subject, given).states[-1]
            moved = _distance(final, clip.full.states[-1])
            by_scheduler = abs(coefficients[step]) * _distance(changed, outputs[step])
            if moved > 0 and by_scheduler > 0:
                logs.append(math.log(moved / by_scheduler))
        if logs:
            known[step] = float(np.mean(logs))
        say(f"sensitivity of step {step + 1}: {math.exp(known.get(step, 0.0)):.2f} times the scheduler's")
    places = sorted(known)
    growth = np.interp(np.arange(steps), places, [known[place] for place in places])
    sensitivity: Doubles = coefficients * np.exp(growth)
    return sensitivity


# 4. Paths and factors.


def _best_path(
    subject: Subject, clips: Sequence[Clip], windows: Windows, cost: Doubles, computed: int, runs: int
) -> list[int]:
    """The path whose runs are closest to the full ones, of at most `runs` paths: some of small cost, then
    those that differ from the best one so far in one step by 1 or 2."""

    def finals(path: Sequence[int]) -> list[Tensor]:
        joint = windows.joint_factors(path, RIDGES["joint"])
        if computed >= JOINT_SHARE * subject.num_steps:
            return [cached_run(subject, clip, path, joint).states[-1] for clip in clips]
        return _matched(subject, clips, path, joint)[1]

    full = [clip.full.states[-1] for clip in clips]
    peak = subject.peak or _peak(full)
    scores: dict[tuple[int, ...], float] = {}
    waiting = [tuple(path) for path in windows.paths(cost, computed, max(1, runs // 2))]
    if runs == 1:
        return list(waiting[0])
    best = waiting[0]
    while waiting and len(scores) < runs:
        path = waiting.pop(0)
        scores[path] = _mean_psnr(finals(path), full, peak)
        if scores[path] > scores.get(best, -math.inf):
            best = path
        if not waiting:
            near = [one for one in _neighbours(best, subject.num_steps) if one not in scores]
            waiting = sorted(near, key=lambda one: windows.total(cost, one))[:NEAR]
    return list(best)


def _neighbours(path: Sequence[int], num_steps: int) -> list[tuple[int, ...]]:
    """Paths that differ in one step by 1 or 2."""
    found = []
    for place in range(1, len(path)):
        low, high = path[place - 1], path[place + 1] if place + 1 < len(path) else num_steps
        for step in range(max(low + 1, path[place] - 2), min(high, path[place] + 3)):
            if step != path[place]:
                found.append((*path[:place], step, *path[place + 1 :]))
    return found


def _fit(subject: Subject, clips: Sequence[Clip], windows: Windows, path: list[int]) -> Budget:
    """The best of the candidates for the factors of a path, and whether its timesteps alone are better."""
    fits: dict[str, list[float]] = {}
    finals: dict[str, list[Tensor]] = {}
    for name, ridge in RIDGES.items():
        fits[name] = windows.joint_factors(path, ridge)
        finals[name] = [cached_run(subject, clip, path, fits[name]).states[-1] for clip in clips]
    if len(path) < subject.num_steps:
        fits["matched"], finals["matched"] = _matched(subject, clips, path, None)
        fits["mean"], finals["mean"] = _matched(subject, clips, path, fits["joint"])
    peak = subject.peak or _peak([clip.full.states[-1] for clip in clips])
    scores = {
        name: _mean_psnr(found, [clip.full.states[-1] for clip in clips], peak)
        for name, found in finals.items()
    }
    fit = max(scores, key=lambda name: scores[name])
    use = CACHE
    if _has_sigmas(subject):
        grid = PlannedTimesteps([step + 1 for step in path], subject.num_steps)
        found = [trajectory(subject, clip.prompt, clip.seed, grid=grid).states[-1] for clip in clips]
        scores["timesteps alone"] = _mean_psnr(found, [clip.full.states[-1] for clip in clips], peak)
        use = TIMESTEPS if scores["timesteps alone"] > scores[fit] else CACHE
    numbers = clips[0].start.numel()
    predicted = [decibel(peak, error / numbers) for error in windows.remaining(path, fits[fit])]
    return Budget(path, fits[fit], fit, use, float(np.mean(predicted)), scores)


def _refit(subject: Subject, clips: Sequence[Clip], budget: Budget, level: str) -> None:
    """Factors of another level: a Gauss-Newton step on the difference to the full runs' outputs. Its Jacobian
    comes from runs in which one factor is changed."""
    computed = [step + 1 for step in budget.path]
    results = [clip.full.result for clip in clips if clip.full.result is not None]
    full = torch.stack([flat(result) for result in results]).double()
    peak = subject.peak or _peak(results)

    def outputs(factors: Sequence[float]) -> Tensor:
        enable(subject.model, PlannedPath(computed, factors, level), num_steps=subject.num_steps)
        try:
            return torch.stack([flat(subject.generate(clip.prompt, clip.seed)) for clip in clips]).double()
        finally:
            disable(subject.model)

    def score(found: Tensor) -> float:
        return _mean_psnr(list(found), list(full), peak)

    windows = path_windows(budget.path, subject.num_steps)
    used = [w for w, (h, i, j) in enumerate(windows) if h >= 0 and j > i + 1]
    base = outputs(budget.factors)
    candidates = {level: (score(base), budget.factors)}
    if used:
        columns = []
        for w in used:
            changed = list(budget.factors)
            changed[w] += CHANGE
            columns.append((outputs(changed) - base).flatten() / CHANGE)
        slopes = torch.stack(columns).numpy()
        normal = slopes @ slopes.T
        normal += RIDGES["joint"] * np.diag(np.diag(normal))
        step = np.linalg.solve(normal, slopes @ (full - base).flatten().numpy())
        for share in (1.0, 0.5):
            moved = list(budget.factors)
            for w, change in zip(used, step, strict=True):
                moved[w] += share * float(change)
            candidates[f"{level}, refitted x {share:g}"] = score(outputs(moved)), moved
    budget.fit = max(candidates, key=lambda name: candidates[name][0])
    budget.factors = candidates[budget.fit][1]
    budget.calibration = {name: value for name, (value, _) in candidates.items()}
    budget.use = CACHE


def _matched(
    subject: Subject, clips: Sequence[Clip], path: Sequence[int], prior: Sequence[float] | None
) -> tuple[list[float], list[Tensor]]:
    """Factors that bring the latents at the end of each window, in order, as close as possible to those of
    the full run; with `prior`, the mean of that and the prior. And the final latents with them."""
    steps = subject.num_steps
    factors = [0.0] * len(path)
    outputs: list[list[Tensor]] = [[] for _ in clips]
    for place, (h, i, j) in enumerate(path_windows(path, steps)):
        if j == i + 1 and j < steps:
            continue  # computed together with the next window's first step
        for number, clip in enumerate(clips):
            known = outputs[number]

            def given(step: int, _: Any, known: list[Tensor] = known) -> Tensor | None:
                return known[step] if step < len(known) else None

            outputs[number] = clip.run(subject, given, stop=i + 1).outputs
        if h >= 0 and j > i + 1:
            factor = _matching(clips, outputs, h, i, j)
            factors[place] = factor if prior is None else (factor + prior[place]) / 2
        for known in outputs:
            known += [forecast(known, h, i, step, factors[place]) for step in range(i + 1, j)]
    finals = [clip.full.solver.run(clip.start, known)[-1] for clip, known in zip(clips, outputs, strict=True)]
    return factors, finals


def _matching(clips: Sequence[Clip], outputs: Sequence[list[Tensor]], h: int, i: int, j: int) -> float:
    product = size = 0.0
    for clip, known in zip(clips, outputs, strict=True):
        ends = [
            clip.full.solver.run(
                clip.start, [*known, *(forecast(known, h, i, step, f) for step in range(i + 1, j))]
            )
            for f in (0.0, 1.0)
        ]
        held, moved = flat(ends[0][j]), flat(ends[1][j])
        product += float((flat(clip.full.states[j]) - held) @ (moved - held))
        size += float((moved - held) @ (moved - held))
    return product / size if size else 0.0


# 5. Evaluation.


def _evaluate(subject: Subject, prompt: Any, seed: int, found: PathCalibration) -> None:
    """Adds the PSNR of a held-out prompt to each budget."""
    full = subject.generate(prompt, seed)
    peak = subject.peak or _peak([full])

    for number, budget in found.budgets.items():
        computed = [step + 1 for step in budget.path]
        policy: Any = PlannedPath(computed, budget.factors, found.level)
        if budget.use == TIMESTEPS:
            policy = PlannedTimesteps(computed, subject.num_steps)
        budget.held_out.setdefault("planned", []).append(
            psnr(enabled_run(subject, policy, prompt, seed)[0], full, peak)
        )
        if subject.generate_with is not None:
            fewer = subject.generate_with(prompt, seed, number)
            budget.held_out.setdefault("fewer steps", []).append(psnr(fewer, full, peak))


def _mean_psnr(outputs: Sequence[Tensor], full: Sequence[Tensor], peak: float) -> float:
    return float(np.mean([psnr(a, b, peak) for a, b in zip(outputs, full, strict=True)]))


def _peak(full: Sequence[Tensor]) -> float:
    return max(float(one.max() - one.min()) for one in full)


def _distance(a: Tensor, b: Tensor) -> float:
    return float((flat(a) - flat(b)).norm())


def _timesteps(solver: Solver) -> list[float] | None:
    timesteps = getattr(solver.scheduler, "timesteps", None)
    return [float(one) for one in timesteps] if isinstance(timesteps, Tensor) else None


def _has_sigmas(subject: Subject) -> bool:
    """Whether the scheduler can take some of its timesteps only."""
    scheduler = subject.sampler
    sigmas = getattr(scheduler, "sigmas", None)
    return hasattr(scheduler, "set_timesteps") and sigmas is not None

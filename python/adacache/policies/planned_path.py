# SPDX-License-Identifier: Apache-2.0
"""A planned path: the computed steps were chosen by a calibration, and the others are extrapolated linearly
with one fitted factor per window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from adacache.checks import anything, array, fields, number, optional, refuse, text, whole
from adacache.files import read_json
from adacache.policies.base import (
    Action,
    ComputeAlways,
    Decider,
    Keep,
    Plan,
    Step,
    What,
    check_dtype,
    check_steps,
    check_storage,
    dtype_name,
)
from adacache.rows import to_device
from adacache.sites import GUIDED, MODEL, ModelSites

FORMAT = "adacache planned path"
LEVELS = ("guided", "branch", "stack")
CACHE, TIMESTEPS = "cache", "timesteps"


@dataclass(frozen=True)
class Origin:
    """What a path was calibrated on; None: not checked.

    Attributes:
        model, scheduler: names of the classes.
        num_steps: denoising steps.
        timesteps: of the scheduler, in order.
        shape: of the latents without the batch dimension.
    """

    model: str | None = None
    scheduler: str | None = None
    num_steps: int | None = None
    timesteps: tuple[float, ...] | None = None
    shape: tuple[int, ...] | None = None

    def of_shape(self, shape: Sequence[int]) -> str | None:
        """How latents [B, ...] differ from the calibrated ones; None: they do not. Inputs of a model may have
        more channels than the latents that it denoises."""
        if self.shape is None:
            return None
        found, known = tuple(shape[1:]), self.shape
        pairs = list(zip(found, known, strict=False))
        sizes = pairs[-2:] if len(known) > 2 else pairs[:1]
        if len(found) == len(known) and all(a == b for a, b in sizes) and sum(a != b for a, b in pairs) < 2:
            return None
        return f"latents of shape {list(known)}, and these have {list(found)}"

    def of_scheduler(self, name: str, timesteps: Sequence[float]) -> str | None:
        """How a scheduler differs from the calibrated one; None: it does not."""
        if self.scheduler not in (None, name):
            return f"the scheduler {self.scheduler}, and this pipeline has {name}"
        if self.timesteps is None or len(timesteps) != len(self.timesteps):
            return None  # a wrong number of steps is refused elsewhere
        worst = max(abs(a - b) for a, b in zip(timesteps, self.timesteps, strict=True))
        scale = max(1e-9, *(abs(one) for one in self.timesteps))
        if worst <= 1e-3 * scale:
            return None
        return "other timesteps (the scheduler's settings or the resolution differ)"


@dataclass(frozen=True)
class PlannedPath:
    """Computes the steps of a path. With h < i the last two computed steps, the output of a step k after i is

        F_k = F_i + factor * (k - i) / (i - h) * (F_i - F_h)

    where F is what `level` names; before there are two computed steps, F_k = F_i. Nothing is measured or
    decided at run time. `adacache calibrate` writes files with paths and factors for several budgets.

    Attributes:
        computed: the computed steps, ascending from 1.
        factors: one per computed step, for the steps between it and the next computed one; 0 holds the
            output, 1 continues it linearly.
        level: "guided": the guided output that a pipeline passes to its scheduler; the model is not called at
            other steps. Outside a pipeline this means "branch". "branch": the output of each of the model's
            guidance branches; the model is not called at other steps. "stack": the residual of all blocks;
            the model is called at each step.
        cache_dtype: of the kept factors; None: float32 for "guided", else that of the features.
        origin: what the path was calibrated on.
    """

    computed: Sequence[int]
    factors: Sequence[float]
    level: str = "guided"
    cache_dtype: torch.dtype | None = None
    origin: Origin = Origin()

    per_video = False

    @property
    def wraps(self) -> str:
        return {"guided": "guided", "branch": "model", "stack": "blocks"}[self.level]

    def outside_pipeline(self) -> PlannedPath:
        """The same where no scheduler's step can be wrapped."""
        return replace(self, level="branch") if self.level == "guided" else self

    def __post_init__(self) -> None:
        computed = array(whole(1), least=1)(list(self.computed), "computed")
        if computed[0] != 1 or computed != sorted(set(computed)):
            raise ValueError(f"computed: expected steps that rise from 1, got {computed}")
        factors = array(number(), least=1)(list(self.factors), "factors")
        if len(factors) != len(computed):
            raise ValueError(f"factors: expected {len(computed)}, one per computed step, got {len(factors)}")
        text(*LEVELS)(self.level, "level")
        check_dtype(self.cache_dtype)
        if self.cache_dtype == torch.float8_e4m3fn:
            raise ValueError(
                "cache_dtype: expected float32, bfloat16, float16 or None, because factors of a forecast "
                "need more digits, got float8_e4m3fn"
            )
        object.__setattr__(self, "computed", tuple(computed))
        object.__setattr__(self, "factors", tuple(float(factor) for factor in factors))

    def check(self, sites: ModelSites, num_steps: int) -> None:
        check_steps(num_steps)
        if self.level == "stack":
            check_storage("stack", sites)
        if self.origin.num_steps not in (None, num_steps):
            raise ValueError(
                f"num_steps: the path was calibrated for {self.origin.num_steps} steps, got {num_steps}"
            )
        if self.computed[-1] > num_steps:
            raise ValueError(
                f"num_steps: the path computes step {self.computed[-1]}, got a schedule of {num_steps}"
            )

    def start(
        self, sites: ModelSites, num_steps: int, num_videos: int, device: torch.device
    ) -> PlannedPathDecider:
        self.check(sites, num_steps)
        return PlannedPathDecider([self] * num_videos, sites, device)

    def weight(self, step: int) -> float | None:
        """Of (F_i - F_h) / (i - h) in the forecast of a step; None: the step is computed."""
        window = sum(computed <= step for computed in self.computed) - 1
        ahead = step - self.computed[window]
        return self.factors[window] * ahead if ahead else None

    def describe(self) -> dict[str, Any]:
        return {
            "policy": "PlannedPath",
            "computed": list(self.computed),
            "factors": list(self.factors),
            "level": self.level,
            "cache_dtype": dtype_name(self.cache_dtype),
        }


class PlannedPathDecider(Decider):
    """Planned paths at work on one request.

    Args:
        paths: of each video; all of one level.
    """

    def __init__(self, paths: Sequence[PlannedPath], sites: ModelSites, device: torch.device):
        self._paths = list(paths)
        self._device = device
        level, dtype = paths[0].level, paths[0].cache_dtype
        if level == "stack":
            self._forecast = sites.stack
            self.keeps = {sites.stack: Keep(factors=2, dtype=dtype)}
        elif level == "branch":
            self._forecast = MODEL
            self.keeps = {MODEL: Keep(What.OUTPUT, factors=2, dtype=dtype)}
        else:
            self._forecast = GUIDED
            self.keeps = {
                # What the pipeline gets in place of the model's output; its guidance is then replaced.
                MODEL: Keep(What.OUTPUT),
                GUIDED: Keep(What.OUTPUT, factors=2, dtype=dtype or torch.float32),
            }

    def known(self, number: int) -> list[bool | None]:
        return [number in path.computed for path in self._paths]

    def plan(self, step: Step) -> Plan:
        weights = [path.weight(step.number) for path in self._paths]
        if all(weight is None for weight in weights):
            return Plan()
        actions = {}
        for site in self.keeps:
            skipped = Action.FORECAST if site == self._forecast else Action.REUSE
            actions[site] = [Action.COMPUTE if weight is None else skipped for weight in weights]
        coefficients = torch.tensor([[1.0, weight or 0.0] for weight in weights])
        return Plan(actions, {self._forecast: to_device(coefficients, self._device)})


@dataclass(frozen=True)
class PlannedTimesteps:
    """Samples at some of the scheduler's timesteps only, and computes at each: no cache.

    With a multistep solver this can be as good as a cached path. It needs a pipeline whose scheduler states
    its `sigmas`.

    Attributes:
        steps: steps of the scheduler's own schedule that are taken, ascending from 1.
        num_steps: steps of that schedule.
        origin: what was calibrated.
    """

    steps: Sequence[int]
    num_steps: int
    origin: Origin = Origin()

    wraps = "model"
    per_video = False

    def __post_init__(self) -> None:
        whole(1)(self.num_steps, "num_steps")
        steps = array(whole(1, self.num_steps), least=1)(list(self.steps), "steps")
        if steps[0] != 1 or steps != sorted(set(steps)):
            raise ValueError(f"steps: expected steps that rise from 1, got {steps}")
        object.__setattr__(self, "steps", tuple(steps))

    def check(self, sites: ModelSites, num_steps: int) -> None:
        if num_steps not in (len(self.steps), self.num_steps):
            raise ValueError(
                f"num_steps: these timesteps are {len(self.steps)} of a pipeline's {self.num_steps}, got a "
                f"loop of {num_steps}"
            )

    def select(self, scheduler: Any) -> None:
        """Leaves a scheduler only these timesteps, after its `set_timesteps`.

        Raises:
            ValueError: it has another number of timesteps, or no sigmas to select from.
        """
        timesteps, sigmas = scheduler.timesteps, getattr(scheduler, "sigmas", None)
        name = type(scheduler).__name__
        if len(timesteps) != self.num_steps:
            raise ValueError(
                f"num_inference_steps: {len(self.steps)} timesteps were calibrated for a schedule of "
                f"{self.num_steps} steps, got {len(timesteps)}"
            )
        if sigmas is None or len(sigmas) != self.num_steps + 1:
            raise ValueError(
                f"policy: {name} does not state one sigma per step, so single timesteps cannot be left out; "
                "use a planned path with a cache"
            )
        kept = [step - 1 for step in self.steps]
        scheduler.timesteps = timesteps[kept]
        scheduler.sigmas = sigmas[[*kept, self.num_steps]]
        scheduler.num_inference_steps = len(kept)

    def start(self, sites: ModelSites, num_steps: int, num_videos: int, device: torch.device) -> Decider:
        self.check(sites, num_steps)
        return ComputeAlways()

    def describe(self) -> dict[str, Any]:
        return {"policy": "PlannedTimesteps", "steps": list(self.steps), "num_steps": self.num_steps}


def is_path_file(values: Any) -> bool:
    """Whether the values of a JSON file are those of a calibrated path."""
    return isinstance(values, Mapping) and values.get("format") == FORMAT


def read_paths(path: str | Path) -> dict[str, Any]:
    """The values of a file of calibrated paths.

    Raises:
        ValueError: it is not such a file.
    """
    try:
        values: dict[str, Any] = read_json(path, _FILE)
    except (OSError, ValueError) as error:
        raise ValueError(f"policy: not a file that `adacache calibrate` wrote: {error}") from error
    for budget, entry in values["budgets"].items():
        where = f"policy: {path}: budgets.{budget}"
        if budget != str(len(entry["computed"])):
            raise ValueError(f"{where}.computed: expected {budget} steps, got {len(entry['computed'])}")
        if entry["computed"][-1] > values["num_steps"]:
            raise ValueError(f"{where}.computed: expected steps up to {values['num_steps']}")
    return values


def planned(
    path: str | Path,
    *,
    num_steps: int | None = None,
    budget: int | None = None,
    speedup: float | None = None,
    level: str | None = None,
) -> PlannedPath | PlannedTimesteps:
    """The settings in a file of calibrated paths.

    Args:
        num_steps: steps of the schedule; None: those of the file.
        budget: computed steps; one of those in the file.
        speedup: instead of `budget`: the largest budget of at most num_steps / speedup computed steps.
        level: instead of the level in the file, see `PlannedPath`.

    Raises:
        ValueError: not such a file, another number of steps, or a budget that is not in it.
    """
    values = read_paths(path)
    steps = values["num_steps"]
    budget = budget_of(path, values, budget, speedup)
    entry = values["budgets"][str(budget)]
    thinned = entry["use"] == TIMESTEPS and level is None
    check_num_steps(path, values, num_steps, *([budget] if thinned else []))
    origin = origin_of(values)
    if thinned:
        return PlannedTimesteps(entry["computed"], steps, origin)
    return PlannedPath(entry["computed"], entry["factors"], level or values["level"], origin=origin)


def budget_of(path: str | Path, values: dict[str, Any], budget: int | None, speedup: float | None) -> int:
    """The budget in a file that `budget` or `speedup` selects; see `planned`."""
    steps = values["num_steps"]
    budgets = sorted(int(one) for one in values["budgets"])
    if (budget is None) == (speedup is None):
        given = "neither" if budget is None else "both"
        raise ValueError(
            f"budget: expected either budget= (computed steps, one of {budgets}) or speedup=, got {given}"
        )
    if speedup is not None:
        number(above=0)(speedup, "speedup")
        fitting = [one for one in budgets if one * speedup <= steps + 1e-9]
        if not fitting:
            raise ValueError(
                f"speedup: {path} has budgets {budgets} of {steps} steps, so at most "
                f"{steps / budgets[0]:.2f}, got {speedup}"
            )
        budget = fitting[-1]
    if budget not in budgets:
        raise ValueError(f"budget: {path} was calibrated for budgets {budgets}, got {budget!r}")
    return budget


def check_num_steps(path: str | Path, values: dict[str, Any], num_steps: int | None, *others: int) -> None:
    """Raises ValueError unless the file, or one of `others`, has this number of steps."""
    steps = values["num_steps"]
    if num_steps not in (None, steps, *others):
        raise ValueError(f"num_steps: {path} was calibrated for {steps} steps, got {num_steps}")


def origin_of(values: dict[str, Any]) -> Origin:
    """What the paths of a file were calibrated on."""
    timesteps = values["timesteps"]
    return Origin(
        values["model"],
        values["scheduler"],
        values["num_steps"],
        None if timesteps is None else tuple(timesteps),
        tuple(values["shape"]),
    )


def timesteps(path: str | Path, budget: int) -> list[float]:
    """The timesteps of a budget's path, for a sampler that takes timesteps and computes each.

    Args:
        path: a file of planned paths.
        budget: number of timesteps; one of the budgets in the file.

    Raises:
        ValueError: not such a file, a budget that is not in it, or the file states no timesteps.
    """
    values, found = read_paths(path), planned(path, budget=budget)
    if values["timesteps"] is None:
        raise ValueError(f"path: {path} states no timesteps, because its sampler does not")
    steps = found.steps if isinstance(found, PlannedTimesteps) else found.computed
    return [values["timesteps"][step - 1] for step in steps]


def _budgets(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        refuse(name, "an object with at least one budget", value)
    for budget, entry in value.items():
        if not budget.isdecimal():
            refuse(name, "numbers of computed steps as keys", budget)
        _BUDGET(entry, f"{name}.{budget}")
        PlannedPath(entry["computed"], entry["factors"])
    return value


_BUDGET = fields(
    {
        "computed": array(whole(1), least=1),
        "factors": array(number(), least=1),
        "use": text(CACHE, TIMESTEPS),
    },
    others=anything,
)
_FILE = fields(
    {
        "format": text(FORMAT),
        "model": text(),
        "scheduler": optional(text()),
        "num_steps": whole(1),
        "timesteps": optional(array(number())),
        "shape": array(whole(1)),
        "level": text(*LEVELS),
        "budgets": _budgets,
    },
    others=anything,
)

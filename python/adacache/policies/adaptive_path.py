# SPDX-License-Identifier: Apache-2.0
"""Planned paths of several budgets with a common start, after which each video gets the budget it needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adacache.checks import anything, array, fields, number, refuse, whole
from adacache.policies.base import Step, Sums, Watch, measurement
from adacache.policies.planned_path import (
    Origin,
    PlannedPath,
    PlannedPathDecider,
    budget_of,
    check_num_steps,
    origin_of,
    read_paths,
)
from adacache.rows import HostCopy
from adacache.sites import GUIDED, ModelSites
from adacache_kernels import sum_columns


@dataclass(frozen=True)
class AdaptivePath:
    """Chooses one of several planned paths for each video.

    All paths start with the same `shared` computed steps. At the last of these, the mean square m of the
    guided output predicts the error of each path:

        log(mean squared error of the final latents) = intercept + slope * log(m)

    The video gets the path with the smallest (error + price * computed steps); if m is not finite, the
    longest path. The measurement is read one step later and does not wait for the device.
    `adacache calibrate --adaptive FILE` fits all of these. It works in a pipeline only, because the guided
    output is measured. A pipeline calls its model for a whole batch: at the steps of each video's path.

    Attributes:
        paths: of level "guided".
        shared: number of first computed steps in which all paths agree, at least 2.
        lines: per path, (intercept, slope).
        price: of one computed step, as a mean squared error.
    """

    paths: Sequence[PlannedPath]
    shared: int
    lines: Sequence[tuple[float, float]]
    price: float

    per_video = True
    wraps = "guided"

    def __post_init__(self) -> None:
        paths = tuple(self.paths)
        if not paths or any(not isinstance(path, PlannedPath) or path.level != "guided" for path in paths):
            refuse("paths", 'at least one PlannedPath of level "guided"', self.paths)
        whole(2, min(len(path.computed) for path in paths))(self.shared, "shared")
        # The factor after the last shared step is each path's own.
        starts = {(path.computed[: self.shared], path.factors[: self.shared - 1]) for path in paths}
        if len(starts) > 1:
            raise ValueError(
                f"paths: expected the same first {self.shared} computed steps, and the same factors between "
                "them, in all paths"
            )
        lines = array(array(number(), 2, 2), least=1)([list(line) for line in self.lines], "lines")
        if len(lines) != len(paths):
            raise ValueError(f"lines: expected {len(paths)}, one per path, got {len(lines)}")
        number(0)(self.price, "price")
        object.__setattr__(self, "paths", paths)
        object.__setattr__(self, "lines", tuple((float(a), float(b)) for a, b in lines))

    @property
    def origin(self) -> Origin:
        return self.paths[0].origin

    def outside_pipeline(self) -> AdaptivePath:
        raise ValueError(
            "policy: an adaptive path measures the guided output that a pipeline passes to its scheduler, so "
            "it cannot be enabled on a model by itself; enable it on the pipeline, or use a planned path"
        )

    def check(self, sites: ModelSites, num_steps: int) -> None:
        for path in self.paths:
            path.check(sites, num_steps)

    def start(
        self, sites: ModelSites, num_steps: int, num_videos: int, device: torch.device
    ) -> AdaptivePathDecider:
        self.check(sites, num_steps)
        return AdaptivePathDecider(self, sites, num_videos, device)

    def choose(self, mean_square: float) -> PlannedPath:
        """The path of a video with this mean square of its guided output at the last shared step."""
        if not (math.isfinite(mean_square) and mean_square > 0):
            return max(self.paths, key=lambda path: len(path.computed))
        costs = [
            math.exp(intercept + slope * math.log(mean_square)) + self.price * len(path.computed)
            for path, (intercept, slope) in zip(self.paths, self.lines, strict=True)
        ]
        return self.paths[costs.index(min(costs))]

    def describe(self) -> dict[str, Any]:
        return {
            "policy": "AdaptivePath",
            "paths": [list(path.computed) for path in self.paths],
            "shared": self.shared,
            "lines": [list(line) for line in self.lines],
            "price": self.price,
        }


def adaptive_path(
    path: str | Path,
    *,
    num_steps: int | None = None,
    budget: int | None = None,
    speedup: float | None = None,
) -> AdaptivePath:
    """The settings in a file that `adacache calibrate --adaptive` extended.

    Args:
        num_steps: steps of the schedule; None: those of the file.
        budget: mean computed steps over the calibration clips; one of the budgets in the file.
        speedup: instead of `budget`, see `planned`.

    Raises:
        ValueError: not such a file, another number of steps, or a budget that was not calibrated.
    """
    values = read_paths(path)
    found = values.get("adaptive")
    if found is None:
        raise ValueError(
            f"adaptive: expected False, because `adacache calibrate --adaptive` has not extended {path}"
        )
    check_num_steps(path, values, num_steps)
    budget = budget_of(path, values, budget, speedup)
    found = _ADAPTIVE(found, f"policy: {path}: adaptive")
    if str(budget) not in found["prices"]:
        accepted = sorted(int(one) for one in found["prices"])
        raise ValueError(f"budget: {path} was calibrated for mean budgets {accepted}, got {budget}")
    origin = origin_of(values)
    return AdaptivePath(
        [PlannedPath(one["computed"], one["factors"], origin=origin) for one in found["paths"]],
        found["shared"],
        [one["line"] for one in found["paths"]],
        found["prices"][str(budget)],
    )


class AdaptivePathDecider(PlannedPathDecider):
    """An adaptive path at work on one request."""

    def __init__(self, policy: AdaptivePath, sites: ModelSites, num_videos: int, device: torch.device):
        # Until the measurement arrives, only shared steps and the steps between them are planned.
        longest = policy.choose(math.nan)
        super().__init__([longest] * num_videos, sites, device)
        self.watches = {GUIDED: Watch("cosine")}  # measures squares
        self._policy = policy
        self._last_shared = longest.computed[policy.shared - 1]
        self._sent: HostCopy | None = None
        self._measured: list[float] | None = None

    def known(self, number: int) -> list[bool | None]:
        self._choose()
        if self._measured is None and number > self._last_shared:
            return [None] * len(self._paths)
        return super().known(number)

    def plan(self, step: Step) -> Any:
        if step.number > self._last_shared:
            self._choose()
        return super().plan(step)

    def observe(self, step: Step, site: Any, sums: Sums) -> None:
        if step.number == self._last_shared:
            column = sum_columns(sums.strides).index("sq_new")
            self._sent = HostCopy(sums.values[:, column] / sums.elements)
            self.watches = {}

    def _choose(self) -> None:
        if self._sent is not None and self._measured is None:
            self._measured = self._sent.read().tolist()
            self._paths = [self._policy.choose(value) for value in self._measured]

    def records(self) -> list[dict[str, Any]]:
        self._choose()
        if self._measured is None:
            return []
        step = Step(self._last_shared, 0)
        return [measurement(step, "mean square of the guided output", self._measured)]


def _prices(value: Any, name: str) -> dict[str, float]:
    if not isinstance(value, dict):
        refuse(name, "an object of prices by budget", value)
    return {budget: number(0)(price, f"{name}.{budget}") for budget, price in value.items()}


_ADAPTIVE = fields(
    {
        "shared": whole(2),
        "paths": array(
            fields(
                {
                    "computed": array(whole(1), least=1),
                    "factors": array(number(), least=1),
                    "line": array(number(), 2, 2),
                }
            ),
            least=1,
        ),
        "prices": _prices,
    },
    others=anything,
)

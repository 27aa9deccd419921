# SPDX-License-Identifier: Apache-2.0
"""DPCache (arXiv 2602.22654): a given list of computed steps, chosen by path planning, with a Taylor forecast
between them. `adacache.calibration.paths` has the planner and its cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adacache.checks import array, whole
from adacache.policies.base import MOST_FACTORS, Step
from adacache.policies.scheduled import Scheduled
from adacache.policies.taylorseer import taylor_weights
from adacache.sites import ModelSites


@dataclass(frozen=True)
class DPCache(Scheduled):
    """Computes the steps of a path and forecasts the others by a Taylor expansion, as `TaylorSeer` does.

    With order=0, this runs the schedules of the planners that reuse: LeMiCa (arXiv 2511.00090,
    `paths.minimax`) and GCache (`paths.shortest`).

    Attributes:
        computed: the computed steps, ascending from 1 (published: the first three steps are among them).
        order: of the expansion, 0 to 3 (published: 2).
        cache, parts, cache_dtype: see `Scheduled` (published: the last layer's output alone, which is
            "stack" up to the input of the stack).
    """

    computed: Sequence[int]
    order: int = 2

    def __post_init__(self) -> None:
        computed = array(whole(1), least=1)(list(self.computed), "computed")
        if computed[0] != 1 or computed != sorted(set(computed)):
            raise ValueError(f"computed: expected steps that rise from 1, got {computed}")
        object.__setattr__(self, "computed", tuple(computed))
        whole(0, MOST_FACTORS - 1)(self.order, "order")
        super().__post_init__()

    def check(self, sites: ModelSites, num_steps: int) -> None:
        super().check(sites, num_steps)
        if self.computed[-1] > num_steps:
            raise ValueError(
                f"num_steps: the path computes step {self.computed[-1]}, got a schedule of {num_steps}"
            )

    def computes(self, step: Step) -> bool:
        return step.number in self.computed

    def factors(self) -> int:
        return self.order + 1

    def weights(self, computed: Sequence[int], step: Step) -> list[float]:
        return taylor_weights(self.order, step.number - computed[-1])

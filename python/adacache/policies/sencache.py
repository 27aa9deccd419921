# SPDX-License-Identifier: Apache-2.0
"""SenCache (arXiv 2602.24208): reuses the output while the change of the latents and of the timestep, times
the sensitivities of the model to them, stays small."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adacache.checks import array, number, whole
from adacache.policies.accumulating import actions
from adacache.policies.base import (
    Decider,
    Keep,
    Plan,
    Step,
    Sums,
    Watch,
    What,
    check_dtype,
    check_steps,
    columns_of,
    described,
    measurement,
)
from adacache.sites import LATENTS, MODEL, ModelSites, Site


@dataclass(frozen=True)
class SenCache:
    """Reuses the output of the model if a_x * |x - x_c| + a_t * |t - t_c| <= threshold and fewer than `most`
    steps were skipped in a row. x and t are the latents and the timestep, x_c and t_c those of the last
    computed step, and |x| is the root mean square over the batch.

    Attributes:
        latents, time: a_x and a_t of each step, see `sensitivities`. Lists of another length are interpolated
            (nearest).
        threshold: published: 0.1 or 0.2 (Wan), 0.6 (CogVideoX), 0.5 (LTX).
        early: threshold in the first fifth of the steps (published: 0.01).
        most: the most skipped steps in a row (published: 2 or 3).
        cache_dtype: dtype of the kept output; None: as computed.

    The model is not called at skipped steps. Each step reads the timestep and one number from the device
    before the model runs; the batch has one decision.
    """

    latents: Sequence[float]
    time: Sequence[float]
    threshold: float = 0.1
    early: float = 0.01
    most: int = 3
    cache_dtype: torch.dtype | None = None

    wraps = "model"
    per_video = False

    def __post_init__(self) -> None:
        for name in ("latents", "time"):
            values = array(number(0), least=1)(list(getattr(self, name)), name)
            object.__setattr__(self, name, tuple(float(value) for value in values))
        number(above=0)(self.threshold, "threshold")
        number(0)(self.early, "early")
        whole(1)(self.most, "most")
        check_dtype(self.cache_dtype)

    def check(self, sites: ModelSites, num_steps: int) -> None:
        check_steps(num_steps)

    def start(
        self, sites: ModelSites, num_steps: int, num_videos: int, device: torch.device
    ) -> SenCacheDecider:
        self.check(sites, num_steps)
        return SenCacheDecider(self)

    def describe(self) -> dict[str, Any]:
        return described(self)


class SenCacheDecider(Decider):
    """SenCache at work on one request."""

    needs_timestep = True

    def __init__(self, policy: SenCache):
        self._policy = policy
        self._time = self._computed_at = 0.0
        self._skipped = 0
        self._records: list[dict[str, Any]] = []
        self.keeps = {MODEL: Keep(What.OUTPUT, dtype=policy.cache_dtype)}
        self.signals = {LATENTS: Watch(metric="l2", until=MODEL)}

    def plan(self, step: Step) -> Plan:
        self._time = step.timestep or 0.0
        return Plan()

    def observe(self, step: Step, site: Site, sums: Sums) -> Plan:
        policy = self._policy
        (row,) = columns_of(sums)
        moved = math.sqrt(row["sq_diff"] / sums.elements)
        a_x, a_t = (at_step(values, step) for values in (policy.latents, policy.time))
        change = a_x * moved + a_t * abs(self._time - self._computed_at)
        threshold = policy.early if step.number <= step.num_steps / 5 else policy.threshold
        skip = step.number > 1 and change <= threshold and self._skipped < policy.most
        self._skipped = self._skipped + 1 if skip else 0
        if not skip:
            self._computed_at = self._time
        if step.number > 1:
            self._records.append(measurement(step, "latents and timestep", [change]))
        return Plan({MODEL: actions([skip])})

    def overruled(self, step: Step, site: Site, videos: Sequence[int]) -> None:
        self._skipped, self._computed_at = 0, self._time

    def records(self) -> list[dict[str, Any]]:
        return self._records


def at_step(values: Sequence[float], step: Step) -> float:
    """The value of a step in a list over the schedule, by its nearest entry."""
    share = (step.number - 1) / max(1, step.num_steps - 1)
    return values[round(share * (len(values) - 1))]


@torch.no_grad()
def sensitivities(
    predict: Callable[[Tensor, float], Tensor], states: Sequence[Tensor], times: Sequence[float]
) -> tuple[list[float], list[float]]:
    """a_x and a_t of each step of a run, by finite differences towards the next step.

    Args:
        predict: (latents, timestep) -> the output of the model.
        states, times: latents and timestep of each step, and of one more.
    """
    a_x, a_t = [], []
    for (x, t), (x_next, t_next) in zip(
        zip(states, times, strict=True), zip(states[1:], times[1:], strict=True), strict=False
    ):
        output = predict(x, t)
        a_x.append(_size(predict(x_next, t) - output) / max(1e-12, _size(x_next - x)))
        a_t.append(_size(predict(x, t_next) - output) / max(1e-12, abs(t_next - t)))
    return a_x, a_t


def _size(x: Tensor) -> float:
    """Root mean square."""
    return float(x.double().square().mean().sqrt())

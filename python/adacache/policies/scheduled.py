# SPDX-License-Identifier: Apache-2.0
"""Methods whose computed steps are known before the run: they differ in the schedule and in the weights with
which kept features make a forecast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from adacache.policies.base import (
    Action,
    Decider,
    Keep,
    Plan,
    Recurrence,
    Step,
    What,
    check_dtype,
    check_parts,
    check_steps,
    check_storage,
    described,
)
from adacache.rows import to_device
from adacache.sites import GUIDED, MODEL, ModelSites, Site

CACHES = ("stack", "block", "output", "branch", "guided")


@dataclass(frozen=True, kw_only=True)
class Scheduled:
    """Base of methods with a schedule that all videos share. A method overrides `computes` and, if it
    forecasts, `factors`, `recurrence` and `weights`.

    Attributes:
        cache: the feature that is kept: "stack" (the residual of the whole stack), "block" (that of each
            block), "output" (the outputs of sub-layers; the blocks run at all steps), "branch" (the output
            of each of the model's guidance branches; the model is not called at other steps) or "guided"
            (the guided output that a pipeline passes to its scheduler; outside a pipeline, "branch").
        parts: with cache="output", the sub-layers; None: all.
        cache_dtype: dtype of the kept tensors; None: that of the features.
    """

    cache: str = "stack"
    parts: Sequence[str] | None = None
    cache_dtype: torch.dtype | None = None

    per_video = False

    def __post_init__(self) -> None:
        if self.cache not in CACHES:
            raise ValueError(f"cache: expected one of {list(CACHES)}, got {self.cache!r}")
        if self.parts is not None:
            if self.cache != "output":
                raise ValueError(f"parts: expected None with cache={self.cache!r}, got {self.parts!r}")
            object.__setattr__(self, "parts", check_parts("parts", self.parts))
        check_dtype(self.cache_dtype)
        if self.cache_dtype == torch.float8_e4m3fn and self.forecasts:
            raise ValueError(
                "cache_dtype: expected float32, bfloat16, float16 or None, because factors of a forecast "
                "need more digits, got float8_e4m3fn"
            )

    @property
    def wraps(self) -> str:
        return {"branch": "model", "guided": "guided"}.get(self.cache, "blocks")

    def outside_pipeline(self) -> Scheduled:
        """The same where no scheduler's step can be wrapped."""
        return replace(self, cache="branch") if self.cache == "guided" else self

    forecasts = True
    """Whether skipped steps are forecast, even if from one kept tensor; else they reuse it."""

    def computes(self, step: Step) -> bool:
        """Whether a step is computed."""
        raise NotImplementedError

    def factors(self) -> int:
        """Number of kept tensors per feature."""
        return 1

    def recurrence(self, num_steps: int) -> Recurrence | None:
        """What is kept; see `Keep`."""
        return None

    def weights(self, computed: Sequence[int], step: Step) -> Sequence[float]:
        """The weight of each kept tensor in the forecast of a step.

        Args:
            computed: the computed steps so far.
        """
        raise NotImplementedError

    def check(self, sites: ModelSites, num_steps: int) -> None:
        check_steps(num_steps)
        if self.wraps != "blocks":
            return
        if self.cache != "output":
            check_storage(self.cache, sites)
            return
        known = sites.output_parts
        if not known:
            raise ValueError("cache: this model declares no sub-layers, so 'output' is not supported")
        unknown = [part for part in self.parts or () if part not in known]
        if unknown:
            raise ValueError(f"parts: expected some of the model's sub-layers {list(known)}, got {unknown}")

    def keeps(self, sites: ModelSites, num_steps: int) -> dict[Site, Keep]:
        """What is kept at which sites."""
        own: dict[str, Any] = {"factors": self.factors(), "recurrence": self.recurrence(num_steps)}
        if self.cache in ("stack", "block"):
            return {sites.stack: Keep(storage=self.cache, dtype=self.cache_dtype, **own)}
        if self.cache == "guided":
            # The pipeline gets the model's old output, and its guidance is then replaced.
            dtype = self.cache_dtype or torch.float32
            return {MODEL: Keep(What.OUTPUT), GUIDED: Keep(What.OUTPUT, dtype=dtype, **own)}
        found = [MODEL]
        if self.cache == "output":
            parts = sites.output_parts if self.parts is None else self.parts
            found = [site for part in parts for site in sites.outputs(part)]
        return dict.fromkeys(found, Keep(What.OUTPUT, dtype=self.cache_dtype, **own))

    def start(
        self, sites: ModelSites, num_steps: int, num_videos: int, device: torch.device
    ) -> ScheduledDecider:
        self.check(sites, num_steps)
        return ScheduledDecider(self, self.keeps(sites, num_steps), num_videos, device)

    def describe(self) -> dict[str, Any]:
        return described(self)


class ScheduledDecider(Decider):
    """A schedule at work on one request."""

    def __init__(self, policy: Scheduled, keeps: dict[Site, Keep], num_videos: int, device: torch.device):
        self.keeps = keeps
        self._policy = policy
        self._videos = num_videos
        self._device = device
        self._computed: list[int] = []

    def plan(self, step: Step) -> Plan:
        if self._policy.computes(step):
            self._computed.append(step.number)
            return Plan()
        actions = {site: [Action.REUSE] * self._videos for site in self.keeps}
        if not self._policy.forecasts:
            return Plan(actions)
        weights = self._policy.weights(self._computed, step)
        rows = to_device(torch.tensor([weights] * self._videos, dtype=torch.float32), self._device)
        # Of a guided output, the forecast replaces what the branches give.
        forecast = [site for site in self.keeps if site != MODEL or GUIDED not in self.keeps]
        actions |= dict.fromkeys(forecast, [Action.FORECAST] * self._videos)
        return Plan(actions, dict.fromkeys(forecast, rows))

    def overruled(self, step: Step, site: Site, videos: Sequence[int]) -> None:
        if step.number not in self._computed:
            self._computed.append(step.number)

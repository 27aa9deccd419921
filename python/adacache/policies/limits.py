# SPDX-License-Identifier: Apache-2.0
"""Limits on when another method may skip steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adacache.checks import array, flag, whole
from adacache.policies.base import Action, Decider, Kept, Plan, Policy, Step, Sums, wraps_of
from adacache.sites import ModelSites, Site


@dataclass(frozen=True)
class Limits:
    """Runs another policy, but computes the first and the last steps, the steps of a mask, and the step after
    a number of skipped ones.

    Attributes:
        policy: the other policy.
        first, last: numbers of steps at the start and at the end that are computed.
        most: the most skipped steps in a row; None: any number.
        mask: per step, whether it is computed even if the policy skips it (True); None: no step is.

    `Decider.overruled` is called for steps that the policy planned to skip; a policy that forecasts and does
    not define it is refused.
    """

    policy: Policy
    first: int = 1
    last: int = 0
    most: int | None = None
    mask: Sequence[bool] | None = None

    def __post_init__(self) -> None:
        if not hasattr(self.policy, "start"):
            raise ValueError(f"policy: expected settings of a method, got {type(self.policy).__name__}")
        whole(0)(self.first, "first")
        whole(0)(self.last, "last")
        if self.most is not None:
            whole(0)(self.most, "most")
        if self.mask is not None:
            object.__setattr__(self, "mask", tuple(array(flag)(list(self.mask), "mask")))

    @property
    def per_video(self) -> bool:
        return self.policy.per_video

    @property
    def wraps(self) -> str:
        return wraps_of(self.policy)

    def outside_pipeline(self) -> Limits:
        """The same where no scheduler's step can be wrapped."""
        inner: Any = self.policy
        changed = inner.outside_pipeline() if self.wraps == "guided" else inner
        return Limits(changed, self.first, self.last, self.most, self.mask)

    def check(self, sites: ModelSites, num_steps: int) -> None:
        self.policy.check(sites, num_steps)
        if self.mask is not None and len(self.mask) != num_steps:
            raise ValueError(f"mask: expected {num_steps} values, one per step, got {len(self.mask)}")

    def start(
        self, sites: ModelSites, num_steps: int, num_videos: int, device: torch.device
    ) -> LimitsDecider:
        self.check(sites, num_steps)
        inner = self.policy.start(sites, num_steps, num_videos, device)
        forecasts = any(keep.factors > 1 for keep in inner.keeps.values())
        if forecasts and type(inner).overruled is Decider.overruled:
            name = type(self.policy).__name__
            raise ValueError(
                f"policy: {name} forecasts from a schedule of its own, so its steps cannot be limited"
            )
        return LimitsDecider(self, inner, num_steps, num_videos)

    def describe(self) -> dict[str, Any]:
        return {
            **self.policy.describe(),
            "limits": {
                "first": self.first,
                "last": self.last,
                "most": self.most,
                "mask": None if self.mask is None else list(self.mask),
            },
        }


class LimitsDecider(Decider):
    """Limits at work on one request."""

    def __init__(self, policy: Limits, inner: Decider, num_steps: int, num_videos: int):
        self._policy = policy
        self._inner = inner
        self._num_steps = num_steps
        self._videos = num_videos
        self.keeps = inner.keeps
        self.watches = inner.watches
        self.signals = inner.signals
        self.needs_timestep = inner.needs_timestep
        self.reads_kept = inner.reads_kept
        self._skipped: dict[Site, list[int]] = {site: [0] * num_videos for site in self.keeps}
        self._step = 0
        self._planned = Plan()

    def plan(self, step: Step) -> Plan:
        if self._step:
            self._count(self._planned)
        self._step = step.number
        self._planned = self._limited(step, self._inner.plan(step))
        return self._planned

    def observe(self, step: Step, site: Site, sums: Sums) -> Plan | None:
        revised = self._inner.observe(step, site, sums)
        if revised is None:
            return None
        limited = self._limited(step, revised)
        self._planned = self._planned.revised(limited)
        return limited

    def finished(self, step: Step, kept: Kept) -> None:
        self._inner.finished(step, kept)

    @property
    def uses_finished(self) -> bool:
        return self._inner.uses_finished

    def known(self, number: int) -> Sequence[bool | None]:
        if self._computes(number):
            return [True] * self._videos
        # A forced step before `number`, or `most`, may change what the policy plans.
        is_next = number == self._step + 1 and self._policy.most is None
        return self._inner.known(number) if is_next else ()

    def records(self) -> list[dict[str, Any]]:
        return self._inner.records()

    def _limited(self, step: Step, plan: Plan) -> Plan:
        policy, everything = self._policy, self._computes(step.number)
        limited: dict[Site, list[Action]] = {}
        for site, actions in plan.actions.items():
            forced = [
                video
                for video, (action, skipped) in enumerate(zip(actions, self._skipped[site], strict=True))
                if action is not Action.COMPUTE
                and (everything or (policy.most is not None and skipped >= policy.most))
            ]
            limited[site] = [
                Action.COMPUTE if video in forced else action for video, action in enumerate(actions)
            ]
            if forced:
                self._inner.overruled(step, site, forced)
        return Plan(limited, plan.coefficients)

    def _computes(self, number: int) -> bool:
        """Whether a step is computed even if the policy skips it."""
        policy = self._policy
        ends = number <= policy.first or number > self._num_steps - policy.last
        return ends or (policy.mask is not None and policy.mask[number - 1])

    def _count(self, plan: Plan) -> None:
        """Counts the skipped steps of the step before."""
        for site, skipped in self._skipped.items():
            actions = plan.actions.get(site, [Action.COMPUTE] * self._videos)
            self._skipped[site] = [
                0 if action is Action.COMPUTE else count + 1
                for count, action in zip(skipped, actions, strict=True)
            ]

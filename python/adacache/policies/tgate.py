# SPDX-License-Identifier: Apache-2.0
"""T-GATE (arXiv 2404.02747): cross-attention outputs settle early, so they are reused after a gate step;
before it, self-attention outputs are reused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from adacache.checks import whole
from adacache.policies.base import (
    Action,
    Decider,
    Keep,
    Plan,
    Step,
    What,
    check_dtype,
    check_steps,
    described,
)
from adacache.sites import ModelSites

SELF_ATTENTION = ("attention", "spatial_attention", "temporal_attention")
CROSS_ATTENTION = "cross_attention"


@dataclass(frozen=True)
class TGATE:
    """Up to the gate step, cross-attention is computed at all steps, and self-attention in the warm-up, at
    every `interval`-th step and at the gate step. After it, cross-attention outputs are reused, and
    self-attention is computed at every `after`-th step.

    Attributes:
        gate: the gate step, from 1 (published: 10).
        interval: of self-attention up to the gate step (published: 5).
        warm_up: number of steps at the start that compute all (published: 2).
        after: interval of self-attention after the gate step (published: 1).
        cache_dtype: dtype of the kept outputs; None: as computed.

    The published method also drops guidance after the gate step, and reuses the mean of the cross-attention
    outputs of both guidance branches. A cache inside the model cannot drop guidance: the sampler calls both
    branches. So here each branch reuses its own outputs, and guidance goes on.
    """

    gate: int = 10
    interval: int = 5
    warm_up: int = 2
    after: int = 1
    cache_dtype: torch.dtype | None = None

    per_video = False

    def __post_init__(self) -> None:
        whole(1)(self.gate, "gate")
        whole(1)(self.interval, "interval")
        whole(1)(self.warm_up, "warm_up")
        whole(1)(self.after, "after")
        check_dtype(self.cache_dtype)

    def check(self, sites: ModelSites, num_steps: int) -> None:
        check_steps(num_steps)
        if CROSS_ATTENTION not in sites.output_parts:
            raise ValueError(
                f"model: T-GATE needs a sub-layer {CROSS_ATTENTION!r}, "
                f"this model has {list(sites.output_parts)}"
            )

    def start(self, sites: ModelSites, num_steps: int, num_videos: int, device: torch.device) -> TGATEDecider:
        self.check(sites, num_steps)
        return TGATEDecider(self, sites, num_videos)

    def describe(self) -> dict[str, Any]:
        return described(self)


PRESETS = {"tgate/video": TGATE()}


class TGATEDecider(Decider):
    """T-GATE at work on one request."""

    def __init__(self, policy: TGATE, sites: ModelSites, num_videos: int):
        self._policy = policy
        self._reuse = [Action.REUSE] * num_videos
        self._cross = sites.outputs(CROSS_ATTENTION)
        self._self = [site for part in SELF_ATTENTION for site in sites.outputs(part)]
        self.keeps = dict.fromkeys((*self._cross, *self._self), Keep(What.OUTPUT, dtype=policy.cache_dtype))

    def plan(self, step: Step) -> Plan:
        policy, i = self._policy, step.number
        if i > policy.gate:
            reused = [*self._cross, *([] if (i - 1) % policy.after == 0 else self._self)]
        elif i == policy.gate or i <= policy.warm_up or (i - 1) % policy.interval == 0:
            reused = []
        else:
            reused = self._self
        return Plan(dict.fromkeys(reused, self._reuse))

# SPDX-License-Identifier: Apache-2.0
"""Delta-DiT (arXiv 2406.01125): the rear blocks are skipped early in the schedule, the front blocks late;
each range adds its last computed residual."""

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
    check_dtype,
    check_steps,
    described,
)
from adacache.sites import ModelSites, Site


@dataclass(frozen=True)
class DeltaDiT:
    """Every `interval`-th step computes all blocks. The steps between them skip the last `blocks` blocks up
    to step `gate`, and the first `blocks` blocks after it.

    Attributes:
        blocks: blocks that are skipped (a spatial and a temporal block count as two). No published value for
            video models is known; choose by measuring.
        gate: the last step that skips the rear blocks. No published value for video models is known.
        interval: steps from one full step to the next; 2 by default, ours.
        cache_dtype: dtype of the two kept residuals; None: that of the tokens.
    """

    blocks: int
    gate: int
    interval: int = 2
    cache_dtype: torch.dtype | None = None

    per_video = False

    def __post_init__(self) -> None:
        whole(1)(self.blocks, "blocks")
        whole(0)(self.gate, "gate")
        whole(1)(self.interval, "interval")
        check_dtype(self.cache_dtype)

    def check(self, sites: ModelSites, num_steps: int) -> None:
        check_steps(num_steps)
        most = len(sites.blocks) // 2
        if self.blocks > most:
            raise ValueError(
                f"blocks: expected at most {most}, half of the model's {len(sites.blocks)} blocks, "
                f"got {self.blocks}"
            )

    def start(
        self, sites: ModelSites, num_steps: int, num_videos: int, device: torch.device
    ) -> DeltaDiTDecider:
        self.check(sites, num_steps)
        return DeltaDiTDecider(self, sites, num_videos)

    def describe(self) -> dict[str, Any]:
        return described(self)


class DeltaDiTDecider(Decider):
    """Delta-DiT at work on one request."""

    def __init__(self, policy: DeltaDiT, sites: ModelSites, num_videos: int):
        self._policy = policy
        self._videos = num_videos
        self._front = Site(0, policy.blocks)
        self._rear = Site(sites.stack.last - policy.blocks, sites.stack.last)
        self.keeps = dict.fromkeys((self._front, self._rear), Keep(dtype=policy.cache_dtype))

    def plan(self, step: Step) -> Plan:
        if (step.number - 1) % self._policy.interval == 0:
            return Plan()
        skipped = self._rear if step.number <= self._policy.gate else self._front
        return Plan({skipped: [Action.REUSE] * self._videos})

"""Pyramid Attention Broadcast (PAB, arXiv 2408.12588): outputs of attention sub-layers are reused for a fixed
number of steps, each kind of attention for its own number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from adacache.policies.base import Action, Decider, Keep, Plan, Step, What, check_count, check_steps
from adacache.sites import ModelSites

SLOW = {"spatial_attention": 2, "temporal_attention": 4, "cross_attention": 6, "attention": 2}
FAST = {"spatial_attention": 5, "temporal_attention": 7, "cross_attention": 9, "attention": 5}


@dataclass(frozen=True)
class PAB:
    """Reuses the output of a sub-layer at step i (counted from 0) if i % range != 0 and lo < timestep < hi.

    Attributes:
        ranges: {sub-layer: range}; sub-layers that a model lacks are skipped. The default is the published
            slow setting (2 / 4 / 6 for spatial, temporal and cross attention); `PAB.FAST` is 5 / 7 / 9.
        window: (lo, hi) of timesteps in 0..1000 in which outputs are reused; Open-Sora (450, 930),
            Open-Sora-Plan (100, 850), Latte (100, 800).
        dtype: of the kept outputs; None: as computed.

    The timestep is read on the host, once per step, where the model gets it as a tensor.
    """

    ranges: Mapping[str, int] = field(default_factory=lambda: dict(SLOW))
    window: tuple[float, float] = (450, 930)
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranges", dict(self.ranges))
        if not self.ranges:
            raise ValueError("ranges: expected at least one {sub-layer: range}, got an empty one")
        for part, count in self.ranges.items():
            check_count(f"ranges[{part!r}]", count)
        if len(self.window) != 2 or not 0 <= self.window[0] < self.window[1]:
            raise ValueError(f"window: expected timesteps 0 <= lo < hi, got {self.window!r}")

    per_video = False
    needs_timestep = True

    def check(self, sites: ModelSites, num_steps: int) -> None:
        check_steps(num_steps)
        if not any(sites.outputs(part) for part in self.ranges):
            known = sorted({part for block in sites.blocks for part in block.outputs})
            raise ValueError(
                f"ranges: expected some of the model's sub-layers {known}, got {list(self.ranges)}"
            )

    def start(self, sites: ModelSites, num_steps: int, num_videos: int, device: torch.device) -> PABDecider:
        self.check(sites, num_steps)
        return PABDecider(self, sites, num_videos)

    def describe(self) -> dict[str, Any]:
        return {"policy": "PAB", "ranges": dict(self.ranges), "window": list(self.window)}


class PABDecider(Decider):
    """PAB at work on one request."""

    def __init__(self, policy: PAB, sites: ModelSites, num_videos: int):
        self._policy = policy
        self._videos = num_videos
        self._range = {site: count for part, count in policy.ranges.items() for site in sites.outputs(part)}
        self.keeps = {site: Keep(What.OUTPUT, dtype=policy.dtype) for site in self._range}

    def plan(self, step: Step) -> Plan:
        low, high = self._policy.window
        if step.timestep is None or not low < step.timestep < high:
            return Plan()
        reuse = [Action.REUSE] * self._videos
        return Plan({site: reuse for site, count in self._range.items() if (step.number - 1) % count})

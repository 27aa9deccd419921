# SPDX-License-Identifier: Apache-2.0
"""Pyramid Attention Broadcast (PAB, arXiv 2408.12588): outputs of attention sub-layers are reused for a fixed
number of steps, each kind of attention for its own number."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

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
    check_parts,
    check_steps,
    dtype_name,
)
from adacache.sites import ModelSites


@dataclass(frozen=True)
class PAB:
    """Reuses the output of a sub-layer at step i (from 0) if i % range != 0 and lo < timestep < hi.

    Attributes:
        ranges: {sub-layer: range}; sub-layers that a model lacks are skipped. `PAB.SLOW` (the default) is the
            published 2 / 4 / 6 for spatial, temporal and cross attention, `PAB.FAST` is 5 / 7 / 9;
            "attention" of models with joint attention over space and time counts as spatial.
        window: (lo, hi), in the units of the timesteps that the model gets. Published, for timesteps in
            0..1000: Open-Sora (450, 930), Open-Sora-Plan (100, 850), Latte (100, 800).
        cache_dtype: dtype of the kept outputs; None: as computed.

    The timestep is read on the host, once per step, where the model gets it as a tensor. The published
    broadcast of MLP outputs at listed timesteps is not included; "mlp" can have a range like any sub-layer.
    """

    SLOW: ClassVar[Mapping[str, int]] = {
        "spatial_attention": 2,
        "temporal_attention": 4,
        "cross_attention": 6,
        "attention": 2,
    }
    FAST: ClassVar[Mapping[str, int]] = {
        "spatial_attention": 5,
        "temporal_attention": 7,
        "cross_attention": 9,
        "attention": 5,
    }

    ranges: Mapping[str, int] = field(default_factory=lambda: PAB.SLOW)
    window: tuple[float, float] = (450, 930)
    cache_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.ranges, Mapping):
            raise ValueError(f"ranges: expected {{sub-layer: range}}, got {self.ranges!r}")
        check_parts("ranges", self.ranges)
        object.__setattr__(self, "ranges", dict(self.ranges))
        for part, count in self.ranges.items():
            whole(1)(count, f"ranges[{part!r}]")
        if not _is_window(self.window):
            raise ValueError(f"window: expected two timesteps 0 <= lo < hi, got {self.window!r}")
        object.__setattr__(self, "window", tuple(self.window))
        check_dtype(self.cache_dtype)

    per_video = False

    def check(self, sites: ModelSites, num_steps: int) -> None:
        check_steps(num_steps)
        known = sites.output_parts
        if not set(known) & set(self.ranges):
            raise ValueError(
                f"ranges: expected some of the model's sub-layers {list(known)}, got {list(self.ranges)}"
            )

    def start(self, sites: ModelSites, num_steps: int, num_videos: int, device: torch.device) -> PABDecider:
        self.check(sites, num_steps)
        return PABDecider(self, sites, num_videos)

    def describe(self) -> dict[str, Any]:
        return {
            "policy": "PAB",
            "ranges": dict(self.ranges),
            "window": list(self.window),
            "cache_dtype": dtype_name(self.cache_dtype),
        }


class PABDecider(Decider):
    """PAB at work on one request."""

    needs_timestep = True

    def __init__(self, policy: PAB, sites: ModelSites, num_videos: int):
        self._window = policy.window
        self._videos = num_videos
        self._range = {site: count for part, count in policy.ranges.items() for site in sites.outputs(part)}
        self._inside = False
        self.keeps = dict.fromkeys(self._range, Keep(What.OUTPUT, dtype=policy.cache_dtype))

    def plan(self, step: Step) -> Plan:
        low, high = self._window
        now = step.timestep
        inside = now is not None and low < now < high
        self._inside = self._inside or inside
        if not self._inside and step.number == step.num_steps > 1:
            warnings.warn(
                f"AdaCache: PAB reused nothing, because no timestep was inside window={self._window}; the "
                f"last one was {now}",
                stacklevel=2,
            )
        if not inside:
            return Plan()
        reuse = [Action.REUSE] * self._videos
        return Plan({site: reuse for site, count in self._range.items() if (step.number - 1) % count})


def _is_window(window: Any) -> bool:
    return (
        isinstance(window, tuple | list)
        and len(window) == 2
        and not any(isinstance(edge, bool) or not isinstance(edge, int | float) for edge in window)
        and 0 <= window[0] < window[1]
        and math.isfinite(window[1])
    )


_LATTE = {"spatial_attention": 2, "temporal_attention": 3, "cross_attention": 6}
PRESETS = {
    "pab/open-sora": PAB(),
    "pab/open-sora-fast": PAB(PAB.FAST),
    "pab/open-sora-plan": PAB(window=(100, 850)),
    "pab/latte": PAB(_LATTE, window=(100, 800)),
}

# SPDX-License-Identifier: Apache-2.0
"""Policies for parts of the protocol that the policies of the package do not use, each with a reference rule
as a function of the inputs and outputs of each block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from adacache.policies import Action, Decider, Keep, Plan, Step, Sums, Watch, What
from adacache.sites import ModelSites, Site
from torch import Tensor

import adacache_kernels

COMPUTE, REUSE, FORECAST = Action.COMPUTE, Action.REUSE, Action.FORECAST


class TinyPolicy:
    """A policy without checks.

    Args:
        decider: (sites, videos) -> Decider.
    """

    per_video = True

    def __init__(self, decider: Callable[[ModelSites, int], Decider]):
        self.decider = decider

    def check(self, sites: ModelSites, num_steps: int) -> None:
        pass

    def start(self, sites: ModelSites, num_steps: int, num_videos: int, device: torch.device) -> Decider:
        return self.decider(sites, num_videos)

    def describe(self) -> dict[str, Any]:
        return {"policy": "TinyPolicy"}


@dataclass
class Blocks:
    """The reference rule of all blocks for one video.

    Attributes:
        action: (step, position) -> the action of a block.
        history: per block and stream, its computed steps and residuals.
    """

    action: Callable[[int, int], Action]
    history: dict[tuple[int, int], list[tuple[int, Tensor]]] = field(default_factory=dict)

    def __call__(
        self, step: int, position: int, before: Sequence[Tensor], after: Sequence[Tensor]
    ) -> list[Tensor]:
        """The streams after a block."""
        action, results = self.action(step, position), []
        for k, (x, y) in enumerate(zip(before, after, strict=True)):
            history = self.history.setdefault((position, k), [])
            if action is COMPUTE:
                history.append((step, y - x))
                results.append(y)
                continue
            last, residual = history[-1]
            if action is FORECAST and len(history) > 1:
                older, old = history[-2]
                residual = residual + (residual - old) * ((step - last) / (last - older))
            results.append(x + residual)
        return results


# Videos of one batch that reuse or forecast in the same step.


def mixed_action(step: int, video: int) -> Action:
    if step <= 2 or (step + video) % 4 == 0:
        return COMPUTE
    return REUSE if (video + step // 6) % 2 == 0 else FORECAST


class Mixed(Decider):
    """Actions of `mixed_action` per video and step, with linear forecasts."""

    def __init__(self, sites: ModelSites, videos: int, storage: str, dtype: torch.dtype | None = None):
        self.stack = sites.stack
        self.videos = videos
        self.last = [0] * videos
        self.keeps = {sites.stack: Keep(storage=storage, factors=2, dtype=dtype)}

    def plan(self, step: Step) -> Plan:
        actions = [mixed_action(step.number, video) for video in range(self.videos)]
        # NaN for videos that do not forecast: the runtime must not use these.
        rows = [
            [1.0, float(step.number - last)] if action is FORECAST else [float("nan")] * 2
            for action, last in zip(actions, self.last, strict=True)
        ]
        for video, action in enumerate(actions):
            if action is COMPUTE:
                self.last[video] = step.number
        return Plan({self.stack: actions}, {self.stack: torch.tensor(rows)})


# A watched range of blocks.


class RangeWatch(Decider):
    """Reuses the stack in the step after the residual of blocks [first, last) changed by less than the
    threshold."""

    def __init__(self, sites: ModelSites, videos: int, first: int, last: int, threshold: float, storage: str):
        self.stack = sites.stack
        self.videos = videos
        self.threshold = threshold
        self.reuse_next = [False] * videos
        self.distances: list[list[tuple[int, float]]] = [[] for _ in range(videos)]
        self.keeps = {sites.stack: Keep(storage=storage)}
        self.watches = {Site(first, last): Watch()}

    def plan(self, step: Step) -> Plan:
        self.now = [REUSE if reuse else COMPUTE for reuse in self.reuse_next]
        self.reuse_next = [False] * self.videos
        return Plan({self.stack: self.now})

    def observe(self, step: Step, site: Site, sums: Sums) -> None:
        columns = adacache_kernels.sum_columns(sums.strides)
        for video, values in enumerate(sums.values.tolist()):
            row = dict(zip(columns, values, strict=True))
            if self.now[video] is COMPUTE and row["abs_old"] > 0:
                distance = row["abs_diff"] / row["abs_old"]
                self.distances[video].append((step.number, distance))
                self.reuse_next[video] = distance < self.threshold


@dataclass
class RangeWatchSlowly:
    """The reference rule of `RangeWatch` for one video.

    Attributes:
        layout: (position, tokens) -> tokens in a layout common to all blocks.
    """

    first: int
    last: int
    threshold: float
    layout: Callable[[int, Tensor], Tensor] = lambda position, x: x
    distances: list[tuple[int, float]] = field(default_factory=list)
    computed: list[int] = field(default_factory=list)
    start: Tensor | None = None
    old: Tensor | None = None
    reuse: bool = False
    reuse_next: bool = False

    def __post_init__(self) -> None:
        self.blocks = Blocks(lambda step, position: REUSE if self.reuse else COMPUTE)

    def __call__(
        self, step: int, position: int, before: Sequence[Tensor], after: Sequence[Tensor]
    ) -> list[Tensor]:
        if position == 0:
            self.reuse, self.reuse_next = self.reuse_next, False
            if not self.reuse:
                self.computed.append(step)
        if position == self.first:
            self.start = self.layout(position, before[0])
        result = self.blocks(step, position, before, after)
        if position == self.last - 1 and not self.reuse:
            assert self.start is not None
            new = (self.layout(position, result[0]) - self.start).double()
            if self.old is not None:
                distance = float((new - self.old).abs().sum() / self.old.abs().sum())
                self.distances.append((step, distance))
                self.reuse_next = distance < self.threshold
            self.old = new
        return result


# Ranges of blocks that are reused alternately.

FRONT, MIDDLE, REAR = (0, 3), (3, 5), (5, 8)
"""Ranges of eight blocks; the middle ones always run."""


def delta_action(step: int, position: int) -> Action:
    """Like Delta-DiT: the rear blocks are reused before step 7, the front blocks after; every third step
    computes."""
    reused = REAR if step < 7 else FRONT
    return REUSE if step % 3 != 1 and reused[0] <= position < reused[1] else COMPUTE


class Delta(Decider):
    """Actions of `delta_action` per range of blocks."""

    def __init__(self, sites: ModelSites, videos: int, storage: str = "stack"):
        self.videos = videos
        self.ranges = [Site(*FRONT), Site(*REAR)]
        self.keeps = dict.fromkeys(self.ranges, Keep(storage=storage))

    def plan(self, step: Step) -> Plan:
        return Plan({site: [delta_action(step.number, site.first)] * self.videos for site in self.ranges})


def delta_of_videos(step: int, position: int, video: int) -> Action:
    """`delta_action`, shifted by two steps per video; all videos compute at steps 1 and 8."""
    return COMPUTE if step in (1, 8) else delta_action(step + 2 * video, position)


def measured_steps(steps: int, videos: int) -> list[int]:
    """Steps in which the same videos compute the first and the last block of the watched range."""
    found = []
    for step in range(1, steps + 1):
        first, last = (
            [delta_of_videos(step, position, video) for video in range(videos)]
            for position in (FRONT[0] + 1, REAR[1] - 2)
        )
        if first == last and COMPUTE in first:
            found.append(step)
    return found


class DeltaOfVideos(Delta):
    """Actions of `delta_of_videos` per range and video; records the steps in which a range over both is
    measured."""

    def __init__(self, sites: ModelSites, videos: int, storage: str = "stack"):
        super().__init__(sites, videos, storage)
        self.watches = {Site(FRONT[0] + 1, REAR[1] - 1): Watch()}
        self.measured: list[int] = []

    def observe(self, step: Step, site: Site, sums: Sums) -> None:
        self.measured.append(step.number)

    def plan(self, step: Step) -> Plan:
        return Plan(
            {
                site: [delta_of_videos(step.number, site.first, video) for video in range(self.videos)]
                for site in self.ranges
            }
        )


# Kept sub-layer outputs together with residuals of single videos.

ALONE = {4: 1, 5: 1, 6: 0, 9: 1, 12: 0}
"""Step -> the one of two videos that reuses the residual of the stack."""
OUTPUTS_COMPUTED = {step for step in range(1, 20) if step % 2 or step - 1 in ALONE} | set(ALONE)
"""Outputs are reused at even steps. If only one video runs, outputs are computed and not kept, so the next
step computes them too."""


def beside_action(step: int, video: int) -> Action:
    return REUSE if ALONE.get(step) == video else COMPUTE


class OutputsBesideResiduals(Decider):
    """Two videos: both reuse outputs of a sub-layer at even steps; one reuses the stack at the steps in
    ALONE."""

    def __init__(self, sites: ModelSites, videos: int, part: str):
        self.stack = sites.stack
        self.outputs = sites.outputs(part)
        self.keeps = {self.stack: Keep(), **dict.fromkeys(self.outputs, Keep(What.OUTPUT))}

    def plan(self, step: Step) -> Plan:
        actions = {self.stack: [beside_action(step.number, video) for video in range(2)]}
        if step.number % 2 == 0:
            actions |= {site: [REUSE, REUSE] for site in self.outputs}
        return Plan(actions)

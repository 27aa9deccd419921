# SPDX-License-Identifier: Apache-2.0
"""Records of full runs: the policy `Record` samples residuals, `Recording` predicts steps and errors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adacache.checks import optional, text, whole
from adacache.policies import AdaCache, Keep, Plan, Step, Sums, Watch
from adacache.policies.base import Decider, Kept, check_steps
from adacache.sites import ModelSites, Site

Doubles = NDArray[np.float64]

TOKENS = 512
"""Default number of tokens per video that are recorded of each residual."""


@dataclass(frozen=True)
class Recording:
    """Residual statistics of V videos, of whose N steps all were computed."""

    distances: Doubles
    """[V, N, N]: relative distance between the metric residuals of steps i < j (0-based)."""
    motion: Doubles
    """[V, N]: motion of the metric residual between frames."""
    products: Doubles
    """[V, N, N]: inner products of the stack residuals of two steps, scaled to a mean square of 1."""
    sensitivity: Doubles | None = None
    """[N]: output error per unit error of the stack residual of a step; None: unknown, taken as 1 / N."""

    def __add__(self, other: Recording) -> Recording:
        """The videos of both, without sensitivity."""
        pairs = zip(
            (self.distances, self.motion, self.products),
            (other.distances, other.motion, other.products),
            strict=True,
        )
        return Recording(*(np.concatenate(pair) for pair in pairs))

    @property
    def num_steps(self) -> int:
        return int(self.motion.shape[1])

    def computed(self, policy: AdaCache) -> NDArray[np.bool_]:
        """The steps that each video would compute with the recorded residuals, bool [V, N]."""
        regularisation: dict[str, Any] = {}
        if policy.motion is not None:
            names = ("scale", "power", "divisor", "gradient_weight")
            regularisation = {name: getattr(policy.motion, name) for name in names}
            regularisation["window"] = policy.motion.steps(self.num_steps)
        rates = list(policy.codebook.values())
        return self.computed_by([list(policy.codebook)], [rates], **regularisation)[0]

    def computed_by(self, thresholds: Any, rates: Any, **regularisation: Any) -> NDArray[np.bool_]:
        """The same for many codebooks of one length, bool [codebooks, V, N]."""
        from adacache_kernels import simulate

        return simulate.simulate(self.distances, self.motion, thresholds, rates, **regularisation)[0]

    def errors(self, computed: NDArray[np.bool_]) -> Doubles:
        """Relative output error of each video for schedules [..., V, N]: [..., V].

        The error of the output is the norm of the sum of residual differences at reused steps, each times the
        sensitivity of its step; differences may cancel.
        """
        steps = np.arange(self.num_steps)
        source = np.maximum.accumulate(np.where(computed, steps, 0), axis=-1)
        known = 1 / self.num_steps if self.sensitivity is None else self.sensitivity
        sensitivity = np.broadcast_to(known, computed.shape)
        # Coefficients of the residuals in that sum: +sensitivity where a residual is used, - at its own step.
        counts = -sensitivity
        index = np.indices(computed.shape, sparse=True)[:-1]
        np.add.at(counts, (*index, source), sensitivity)
        squares = np.einsum("...vi,vij,...vj->...v", counts, self.products, counts, optimize=True)
        errors: Doubles = np.sqrt(np.maximum(squares, 0))
        return errors

    def loss(self, computed: NDArray[np.bool_]) -> Doubles:
        """Mean of the errors over the videos: [...]."""
        mean: Doubles = self.errors(computed).mean(axis=-1)
        return mean


@dataclass(frozen=True)
class Record:
    """A policy that computes every step and records some tokens of the residuals, for `Recording`.

    Attributes:
        metric_block, metric_part: the measured block and sub-layer, as for `AdaCache`.
        tokens: recorded per video.
    """

    metric_block: int | None = None
    metric_part: str | None = None
    tokens: int = TOKENS
    deciders: list[RecordDecider] = field(default_factory=list)
    """One per request, in order."""

    per_video = True

    def __post_init__(self) -> None:
        whole(1)(self.tokens, "tokens")
        optional(whole(0))(self.metric_block, "metric_block")
        optional(text())(self.metric_part, "metric_part")

    @property
    def measured(self) -> AdaCache:
        """An AdaCache policy that measures the same block and sub-layer."""
        blocks = None if self.metric_block is None else [self.metric_block]
        return AdaCache(codebook={1.0: 1}, metric_blocks=blocks, metric_part=self.metric_part)

    def check(self, sites: ModelSites, num_steps: int) -> None:
        check_steps(num_steps)
        self._site(sites)

    def _site(self, sites: ModelSites) -> Site:
        return self.measured.watched(sites)[0]

    def start(
        self, sites: ModelSites, num_steps: int, num_videos: int, device: torch.device
    ) -> RecordDecider:
        self.deciders.append(RecordDecider(sites.stack, self._site(sites), num_videos, self.tokens))
        return self.deciders[-1]

    def describe(self) -> dict[str, Any]:
        return {"policy": "Record", "metric_block": self.metric_block, "metric_part": self.metric_part}


class RecordDecider(Decider):
    """The state of `Record` for one request."""

    def __init__(self, stack: Site, site: Site, num_videos: int, tokens: int):
        self.keeps = {stack: Keep()}
        self.watches = {site: Watch(strides=(1,))}
        self._stack, self._site = stack, site
        self._num_videos = num_videos
        self._tokens = tokens
        self._frames = 1
        self._rows = 1
        self._metric: list[Tensor] = []
        self._residuals: list[Tensor] = []

    def plan(self, step: Step) -> Plan:
        return Plan()

    def observe(self, step: Step, site: Site, sums: Sums) -> None:
        self._frames, self._rows = sums.frames, sums.rows

    def finished(self, step: Step, kept: Kept) -> None:
        """Takes samples of the kept residuals."""
        metric, residual = kept.watched(self._site), kept.residual(self._stack)
        assert metric is not None
        self._metric.append(self._sample(metric))
        if residual is not None:
            self._residuals.append(self._sample(residual))

    def _sample(self, residual: Tensor) -> Tensor:
        """Some positions of all frames: [rows, T, positions, C] float32 on the host."""
        channels, frames, rows = residual.shape[-1], self._frames, self._rows
        if residual.shape[0] == rows:
            r = residual.reshape(rows, frames, -1, channels)
        else:  # rows of positions, each with its frames
            r = residual.reshape(rows, -1, frames, channels).transpose(1, 2)
        positions = r.shape[2]
        count = max(1, min(positions, self._tokens // frames))
        index = torch.linspace(0, positions - 1, count, device=r.device).round().long()
        return r[:, :, index].float().cpu()

    def recording(self) -> Recording:
        """The recorded statistics. Row b of a batch is of video b % V.

        Raises:
            RuntimeError: no step ran in the request.
        """
        if not self._metric:
            raise RuntimeError("recording: no step ran in the request")

        def by_video(samples: list[Tensor]) -> Tensor:
            # [N, rows, ...] -> [V, N, rows of a video, T, positions, C]
            return torch.stack(samples).unflatten(1, (-1, self._num_videos)).movedim(2, 0)

        metric = by_video(self._metric)
        # Residuals stored by block: the measured block represents the stack.
        stack = by_video(self._residuals) if len(self._residuals) == len(self._metric) else metric
        return Recording(*compare(metric), inner_products(stack))


def compare(residuals: Tensor) -> tuple[Doubles, Doubles]:
    """Distances [V, N, N] and motion [V, N] of residuals [V, N, rows, T, positions, C], as the ops do."""
    r = residuals.flatten(4)
    videos, steps = r.shape[:2]
    size = r.abs().sum((2, 3, 4), dtype=torch.float64)
    distances = torch.full((videos, steps, steps), torch.nan, dtype=torch.float64)
    for i in range(steps - 1):
        difference = (r[:, i + 1 :] - r[:, i : i + 1]).abs().sum((2, 3, 4), dtype=torch.float64)
        distances[:, i, i + 1 :] = difference / size[:, i : i + 1]
    motion = torch.zeros((videos, steps), dtype=torch.float64)
    if r.shape[3] > 1:
        later, earlier = r[:, :, :, 1:], r[:, :, :, :-1]
        motion = (later - earlier).abs().sum((2, 3, 4), dtype=torch.float64)
        motion /= (later.abs() + earlier.abs()).sum((2, 3, 4), dtype=torch.float64)
    return distances.numpy(), motion.numpy()


def inner_products(residuals: Tensor) -> Doubles:
    """Inner products [V, N, N] of residuals [V, N, ...], scaled to a mean square of 1."""
    r = residuals.flatten(2).double()
    products = r @ r.mT
    squares = products.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    return (products / squares.clamp(min=torch.finfo(torch.float64).tiny)).numpy()

# SPDX-License-Identifier: Apache-2.0
"""AdaCache and motion regularization (MoReg, arXiv 2411.02397).

The rule itself is `adacache_kernels.decide`, which runs on the device. The decider passes it the sums of the
watched sites and reads back a host copy of its state, without synchronizing.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import adacache_kernels
from adacache.checks import refuse
from adacache.policies.base import (
    Action,
    Decider,
    Keep,
    Plan,
    Step,
    Sums,
    Watch,
    check_blocks,
    check_dtype,
    check_steps,
    check_storage,
    dtype_name,
    forced,
)
from adacache.rows import HostCopy, HostRow, to_device
from adacache.sites import ModelSites, Site

RULES = ("published", "paper")
METRICS = ("l1", "l2", "cosine")
CACHES = ("stack", "block", "sublayer")
MOST_STEPS = 2**31 - 1
"""The largest rate."""


@dataclass(frozen=True)
class MotionRegularization:
    """Scales the distance by the motion between latent frames, so that moving videos get more compute
    (MoReg).

    Attributes:
        strides: distances between the frames that are compared, in latent frames.
        window: first and last step (1-based, inclusive) in which it acts: whole numbers are steps, floats
            fractions of the schedule.
        scale, power, divisor: factor = (motion / scale) ** power / divisor. The paper's rule knows only the
            scale.
        gradient_weight: weight of the change of the factor since the last computed step (`mograd_mul`).

    Defaults are those published for Open-Sora with 30 steps.
    """

    strides: Sequence[int] = (1,)
    window: tuple[int, int] | tuple[float, float] = (4, 26)
    scale: float = 0.385
    power: float = 8.0
    divisor: float = 1.0
    gradient_weight: float = 10.0

    def __post_init__(self) -> None:
        if not isinstance(self.strides, Sequence):
            raise ValueError(f"strides: expected a sequence of whole numbers, got {self.strides!r}")
        object.__setattr__(self, "strides", tuple(self.strides))
        if not self.strides or any(not isinstance(s, int) or s < 1 for s in self.strides):
            raise ValueError(f"strides: expected whole numbers of at least 1, got {list(self.strides)}")
        edges = {type(edge) for edge in self.window} if isinstance(self.window, tuple | list) else set()
        if len(edges) != 1 or not edges < {int, float} or len(self.window) != 2:
            raise ValueError(
                f"window: expected two steps (int) or two fractions (float), got {self.window!r}"
            )
        for name in ("scale", "divisor"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: expected a positive number, got {value!r}")
        for name in ("power", "gradient_weight"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}: expected a number of at least 0, got {value!r}")

    def steps(self, num_steps: int) -> tuple[int, int]:
        """The window as steps of a schedule.

        Raises:
            ValueError: the window is empty or not inside the schedule.
        """
        first, last = self.window
        if isinstance(first, float):
            if not 0 <= first < last <= 1:
                raise ValueError(f"window: expected fractions 0 <= first < last <= 1, got {self.window!r}")
            return max(1, math.ceil(first * num_steps)), math.floor(last * num_steps)
        if not 1 <= first <= last <= num_steps:
            raise ValueError(f"window: expected 1 <= first <= last <= {num_steps} steps, got {self.window!r}")
        return int(first), int(last)


@dataclass(frozen=True)
class AdaCache:
    """AdaCache: the smaller the distance of a residual to the last computed one, the longer residuals are
    reused.

    Attributes:
        codebook: {threshold: rate}, thresholds ascending. The first threshold above the distance gives
            the rate: the number of steps to the next computed one. Past all thresholds, the last rate
            applies.
        metric_blocks: numbers of the blocks whose residual is measured (running mean over them); None: the
            middle block.
        metric_part: the sub-layer that is measured, such as "temporal_attention", "spatial_attention",
            "cross_attention", "mlp" or "cross_attention_mlp" (both in one, as the published code caches them)
            of STDiT3, "attention" of models with joint attention, "block" (the residual of a whole block) of
            every model; None: the model's (temporal) self-attention.
        motion: motion regularization, or None.
        rule: "published" makes the decisions of the published code; "paper" follows the paper's equations
            (mean absolute distance per elapsed step, signed motion gradient, no power).
        metric: "l1", "l2" or "cosine".
        per_video: each video of a batch has its own decision; False: one decision for all rows, as published.
        cache: what is stored: "stack" (one residual of the whole stack), "block" (one per block) or
            "sublayer" (one per sub-layer as published; models with a fused program only).
        cache_dtype: dtype of the stored residuals: float32, bfloat16, float16 or float8_e4m3fn (with a scale
            per token); None: the dtype of the tokens.
    """

    codebook: Mapping[float, int]
    metric_blocks: Sequence[int] | None = None
    metric_part: str | None = None
    motion: MotionRegularization | None = None
    rule: str = "published"
    metric: str = "l1"
    per_video: bool = True
    cache: str = "stack"
    cache_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        check_codebook(self.codebook)
        object.__setattr__(self, "codebook", dict(self.codebook))
        if self.metric_blocks is not None:
            if not isinstance(self.metric_blocks, tuple | list | range):
                raise ValueError(
                    f"metric_blocks: expected a sequence of block numbers or None, got {self.metric_blocks!r}"
                )
            object.__setattr__(self, "metric_blocks", tuple(self.metric_blocks))
        if not isinstance(self.motion, MotionRegularization | None):
            raise ValueError(f"motion: expected a MotionRegularization or None, got {self.motion!r}")
        if not isinstance(self.per_video, bool):
            raise ValueError(f"per_video: expected True or False, got {self.per_video!r}")
        for name, accepted in (("rule", RULES), ("metric", METRICS), ("cache", CACHES)):
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name}: expected one of {list(accepted)}, got {getattr(self, name)!r}")
        check_dtype(self.cache_dtype)
        if self.cache_dtype == torch.float8_e4m3fn and self.cache == "sublayer":
            raise ValueError(
                "cache_dtype: float8_e4m3fn needs cache='stack' or cache='block', got cache='sublayer'"
            )

    def watched(self, sites: ModelSites) -> tuple[Site, ...]:
        """The measured sites in the order they run.

        Raises:
            ValueError: the model has no such block or sub-layer.
        """
        part = sites.default_part if self.metric_part is None else self.metric_part
        if part not in sites.parts:
            raise ValueError(f"metric_part: expected one of {list(sites.parts)}, got {part!r}")
        blocks = (max(0, sites.depth // 2 - 1),) if self.metric_blocks is None else self.metric_blocks
        check_blocks(blocks, sites.depth)
        found = tuple(sites.residuals(blocks, part))
        if not found:
            raise ValueError(f"metric_blocks: blocks {list(blocks)} have no {part!r} to measure")
        return found

    def check(self, sites: ModelSites, num_steps: int) -> None:
        check_steps(num_steps)
        self.watched(sites)
        check_storage(self.cache, sites)
        if self.motion is not None:
            self.motion.steps(num_steps)

    def start(
        self, sites: ModelSites, num_steps: int, num_videos: int, device: torch.device
    ) -> AdaCacheDecider:
        self.check(sites, num_steps)
        return AdaCacheDecider(self, sites, num_steps, num_videos, device)

    def describe(self) -> dict[str, Any]:
        motion = None
        if self.motion is not None:
            motion = {name: getattr(self.motion, name) for name in MotionRegularization.__dataclass_fields__}
            motion |= {"strides": list(self.motion.strides), "window": list(self.motion.window)}
        return {
            "policy": "AdaCache",
            "codebook": [[threshold, rate] for threshold, rate in self.codebook.items()],
            "metric_blocks": None if self.metric_blocks is None else list(self.metric_blocks),
            "metric_part": self.metric_part,
            "motion": motion,
            "rule": self.rule,
            "metric": self.metric,
            "per_video": self.per_video,
            "cache": self.cache,
            "cache_dtype": dtype_name(self.cache_dtype),
        }


class AdaCacheDecider(Decider):
    """AdaCache's state for one request: it is on the device, and a copy of it follows to the host."""

    def __init__(
        self, policy: AdaCache, sites: ModelSites, num_steps: int, num_videos: int, device: torch.device
    ):
        motion = policy.motion
        watched = policy.watched(sites)
        strides = (1,) if motion is None else tuple(motion.strides)
        self.keeps = {sites.stack: Keep(storage=policy.cache, dtype=policy.cache_dtype)}
        self.watches = {
            site: Watch(policy.metric, strides, motion_decides=motion is not None) for site in watched
        }
        self._stack = sites.stack
        self._codebook = list(policy.codebook.items())
        self._names = {site: sites.name(site) for site in watched}
        self._index = {site: i for i, site in enumerate(watched)}
        self._unmeasured = False
        self._warned = False
        self._rule: dict[str, Any] = {
            "num_steps": num_steps,
            "thresholds": _sent(list(policy.codebook), device),
            "rates": _sent(list(policy.codebook.values()), device),
            "metric": policy.metric,
            "rule": policy.rule,
            "window": (1, num_steps) if motion is None else motion.steps(num_steps),
            "scale": 0.0 if motion is None else motion.scale,
            "power": 1.0 if motion is None else motion.power,
            "divisor": 1.0 if motion is None else motion.divisor,
            "gradient_weight": 0.0 if motion is None else motion.gradient_weight,
        }
        self._state = adacache_kernels.initial_state(
            num_videos, len(watched), rule=policy.rule, device=device
        )
        self._columns = adacache_kernels.state_columns(len(watched))
        self._host: HostCopy | HostRow = HostCopy(self._state)
        self._copies: list[tuple[Site, int, HostCopy | HostRow]] = []

    def known(self, number: int) -> list[bool | None]:
        if self._unmeasured:
            return []
        next_steps = self._next_steps()
        if forced(number, int(self._rule["num_steps"])):
            return [True] * len(next_steps)
        return [None if number > due else number == due for due in next_steps]

    def _next_steps(self) -> list[int]:
        return [int(due) for due in self._host.read()[:, self._columns.index("next_step")].tolist()]

    def plan(self, step: Step) -> Plan:
        if self._unmeasured and not self._warned:
            self._warned = True
            warnings.warn(
                f"AdaCache: the model did not run {list(self._names.values())} at a computed step, so "
                "nothing was measured; until it does, every step is computed",
                stacklevel=2,
            )
        everything = self._unmeasured or forced(step.number, step.num_steps)
        actions = [
            Action.COMPUTE if everything or due == step.number else Action.REUSE for due in self._next_steps()
        ]
        self._unmeasured = Action.COMPUTE in actions
        return Plan({self._stack: actions})

    def observe(self, step: Step, site: Site, sums: Sums) -> None:
        self._decide(self._state, site, sums, step=step.number)
        self._note(step, site, HostCopy(self._state))

    def shared_rule(self, site: Site) -> Hashable:
        own = {"num_steps", "window", "thresholds", "rates"}  # may differ per video
        common = tuple((name, value) for name, value in self._rule.items() if name not in own)
        return self._index[site], len(self._index), common

    @classmethod
    def observe_together(
        cls, deciders: Sequence[Decider], steps: Sequence[Step], site: Site, sums: Sums
    ) -> None:
        found = [decider for decider in deciders if isinstance(decider, cls)]
        rules, videos = [decider._rule for decider in found], len(found)
        numbers = [step.number for step in steps] + [rule["num_steps"] for rule in rules]
        numbers += [edge for rule in rules for edge in rule["window"]]
        sent = to_device(torch.tensor(numbers, dtype=torch.int32), sums.values.device)
        by_video = {
            "step": sent[:videos],
            "num_steps": sent[videos : 2 * videos],
            "window": sent[2 * videos :].view(videos, 2),
        }
        books = [decider._codebook for decider in found]
        if any(book != books[0] for book in books):
            longest = max(map(len, books))
            padded = [book + book[-1:] * (longest - len(book)) for book in books]
            columns = torch.tensor(padded, dtype=torch.float64).permute(2, 0, 1).contiguous()
            by_video["thresholds"], by_video["rates"] = to_device(columns, sums.values.device)
        state = torch.cat([decider._state for decider in found])
        found[0]._decide(state, site, sums, **by_video)
        copy = HostCopy(state)
        for row, (decider, step) in enumerate(zip(found, steps, strict=True)):
            decider._state = state[row : row + 1]
            decider._note(step, site, copy.row(row))

    def _decide(self, state: Tensor, site: Site, sums: Sums, **by_video: Any) -> None:
        """Calls the rule with its settings, or with those per video where they are given."""
        rule = self._rule | by_video
        # A clip too short for every stride has no motion to measure and is not regularized.
        if not sums.strides:
            rule["scale"] = 0.0
        adacache_kernels.decide(
            sums.values,
            state,
            site=self._index[site],
            frames=sums.frames,
            strides=sums.strides,
            elements=sums.elements,
            **rule,
        )

    def _note(self, step: Step, site: Site, copy: HostCopy | HostRow) -> None:
        self._unmeasured = False
        self._host = copy
        if step.number > 1:
            self._copies.append((site, step.number, copy))

    def records(self) -> list[dict[str, Any]]:
        names = ("distance", "motion", "factor", "rate", "nonfinite")
        records = []
        for site, step, copy in self._copies:
            columns = dict(zip(self._columns, copy.read().T.tolist(), strict=True))
            decided = [int(last) == step for last in columns["last_step"]]
            record: dict[str, Any] = {"step": step, "site": self._names[site]}
            for name in names:
                record[name] = [
                    value if own and math.isfinite(value) else None
                    for value, own in zip(columns[name], decided, strict=True)
                ]
            record["rate"] = [None if rate is None else int(rate) for rate in record["rate"]]
            record["nonfinite"] = [bool(flag) for flag in record["nonfinite"]]
            records.append(record)
        return records


def _sent(values: Sequence[float], device: torch.device) -> Tensor:
    """A float64 tensor built on the host and copied asynchronously: building it on the GPU would
    synchronize."""
    return torch.tensor(values, dtype=torch.float64).to(device, non_blocking=True)


def check_codebook(codebook: Mapping[float, int]) -> None:
    """Raises ValueError unless the codebook has ascending positive thresholds and whole rates of at least
    1."""
    if not isinstance(codebook, Mapping):
        raise ValueError(f"codebook: expected a mapping {{threshold: rate}}, got {codebook!r}")
    if not codebook:
        raise ValueError("codebook: expected at least one {threshold: rate}, got an empty one")
    thresholds = list(codebook)
    if any(isinstance(t, bool) or not isinstance(t, int | float) or not t > 0 for t in thresholds):
        raise ValueError(f"codebook: expected positive thresholds, got {thresholds}")
    if thresholds != sorted(thresholds):
        raise ValueError(f"codebook: expected ascending thresholds, got {thresholds}")
    for threshold, rate in codebook.items():
        if isinstance(rate, bool) or not isinstance(rate, int) or not 1 <= rate <= MOST_STEPS:
            refuse("codebook", f"whole rates of at least 1 (at threshold {threshold})", rate)

# SPDX-License-Identifier: Apache-2.0
"""The policy protocol: what a caching method keeps, what it watches, and its plan for each step."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum, IntEnum
from typing import Any, Protocol

import torch
from torch import Tensor

from adacache.checks import whole
from adacache.sites import ModelSites, Site
from adacache_kernels import sum_columns

MOST_FACTORS = 4
"""What `adacache_kernels.extrapolate_residual` takes in one pass."""
MOST_KEPT = 16
"""The most tensors of a recurrence."""
STORAGE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)


class Action(IntEnum):
    """What a step does at a site, for one video."""

    COMPUTE = 0
    REUSE = 1
    FORECAST = 2


class What(Enum):
    """What is kept at a site, or watched there."""

    RESIDUAL = "residual"
    OUTPUT = "output"


Recurrence = Callable[[Sequence[int], int], Sequence[Sequence[float]]]
"""(steps at which the site was kept before, this step) -> per kept tensor after the first, the weights of the
new feature and of the old tensors in their order; weights that are left out are 0."""


@dataclass(frozen=True)
class Keep:
    """What is kept at a site at each computed step.

    Attributes:
        what: RESIDUAL of a range of blocks, or OUTPUT of a sub-layer, of the model (`sites.MODEL`) or of
            guidance (`sites.GUIDED`).
        storage: of a range: "stack" (one tensor), "block" (one per block) or "sublayer" (one per sub-layer).
        factors: kept tensors: the newest feature, and its first, second ... divided difference over the
            steps between two computed ones. Differences of more computed steps than there were are 0.
        dtype: of the kept tensors; None: that of the tokens.
        recurrence: what is kept in place of divided differences, as linear combinations of the new feature
            and the tensors kept before: earlier features, or running sums of them. More than 4 tensors cost
            a further pass over memory in a forecast.
    """

    what: What = What.RESIDUAL
    storage: str = "stack"
    factors: int = 1
    dtype: torch.dtype | None = None
    recurrence: Recurrence | None = None

    def __post_init__(self) -> None:
        most = MOST_FACTORS if self.recurrence is None else MOST_KEPT
        if not 1 <= self.factors <= most:
            raise ValueError(f"factors: expected 1..{most}, got {self.factors}")
        if self.factors > 1 and self.dtype == torch.float8_e4m3fn:
            raise ValueError(
                "dtype: expected float32, bfloat16, float16 or None with several factors, got float8_e4m3fn"
            )


@dataclass(frozen=True)
class Watch:
    """A tensor that is measured against the one kept from an earlier step.

    Attributes:
        metric: "l1", "l2" or "cosine".
        strides: frame strides of the motion sums.
        until: None: each measured tensor becomes the next old one; a kept site: only those of the
            videos that compute this site at the step do.
        what: of a range of blocks: its RESIDUAL or its OUTPUT. Of `sites.MODEL`: OUTPUT.
        age: the old tensor is the one before `age - 1` newer ones, which are kept too.
        transform: of a signal: applied before it is measured.
        motion_decides: whether decisions depend on the motion sums. If not, they are for the trace, and are
            not measured where they need tokens of other ranks.
    """

    metric: str = "l1"
    strides: tuple[int, ...] = ()
    until: Site | None = None
    what: What = What.RESIDUAL
    age: int = 1
    transform: Callable[[Tensor], Tensor] | None = None
    motion_decides: bool = True


@dataclass(frozen=True)
class Step:
    """A denoising step: its number (from 1) and, if known on the host, its timestep."""

    number: int
    num_steps: int
    timestep: float | None = None


@dataclass(frozen=True)
class Plan:
    """What one step does at each kept site. A site that is not named computes.

    Attributes:
        actions: per site, one action per video. An OUTPUT is computed for all videos if any computes it.
        coefficients: per site that forecasts, float32 [videos, factors] on the model's device; the rows of
            videos that do not forecast are not used.
    """

    actions: Mapping[Site, Sequence[Action]] = field(default_factory=dict)
    coefficients: Mapping[Site, Tensor] = field(default_factory=dict)

    def revised(self, later: Plan) -> Plan:
        """This plan with the actions of `later` in place of its own where both name a site."""
        return Plan({**self.actions, **later.actions}, {**self.coefficients, **later.coefficients})


@dataclass(frozen=True)
class Sums:
    """The sums of one watched site at one step.

    Attributes:
        values: float64 [videos, columns] on the model's device, columns as
            `adacache_kernels.sum_columns(strides)`.
        strides: the strides that were measured: those of the watch that fit into the clip.
        frames: latent frames of the residual.
        elements: elements of the residual per video.
        rows: rows of the batch.
    """

    values: Tensor
    strides: tuple[int, ...]
    frames: int
    elements: float
    rows: int


class Kept(Protocol):
    """The kept tensors of the measured branch."""

    def residual(self, site: Site) -> Tensor | None:
        """The residual kept at a range of blocks [B, N, C]; None: it is not stored as one tensor."""

    def watched(self, site: Site) -> Tensor | None:
        """The residual last measured at a watched site."""


class Decider:
    """A policy's state for one request. Never shared. Methods override what they need.

    Attributes:
        keeps: what is kept at which sites; ranges of blocks must not overlap.
        watches: the sites that are measured where they run.
        signals: inputs that are measured at each step before the step's plan is final (`sites.LATENTS`,
            `sites.TOKENS`, `sites.MODULATED`). A plan that `observe` returns for them holds for the
            whole step. Reading their sums waits for the device.
        needs_timestep: `Step.timestep` is read from the device.
        reads_kept: `finished` reads kept tensors, of which each rank has only its own tokens.
    """

    keeps: Mapping[Site, Keep] = {}
    watches: Mapping[Site, Watch] = {}
    signals: Mapping[Site, Watch] = {}
    needs_timestep = False
    reads_kept = False

    def plan(self, step: Step) -> Plan:
        """The plan of a step, requested before it runs. Must not wait for the device."""
        raise NotImplementedError

    def observe(self, step: Step, site: Site, sums: Sums) -> Plan | None:
        """Called after a watched site or a signal was measured. May revise the plan for the sites that have
        not run."""
        return None

    def shared_rule(self, site: Site) -> Hashable:
        """Deciders of one class with equal rules at a site may observe it in one call. None: none may."""
        return None

    @classmethod
    def observe_together(
        cls, deciders: Sequence[Decider], steps: Sequence[Step], site: Site, sums: Sums
    ) -> None:
        """`observe` for deciders of one video each, with equal `shared_rule`; row i of the sums is of decider
        i. Each gets the bits of a call of its own."""
        raise NotImplementedError

    def overruled(self, step: Step, site: Site, videos: Sequence[int]) -> None:
        """Called if a kept site is computed for videos that the plan skips (`Limits`). A method that counts
        its computed steps notes it."""

    def finished(self, step: Step, kept: Kept) -> None:
        """Called after a forward call of the measured branch."""

    @property
    def uses_finished(self) -> bool:
        """Whether `finished` does anything."""
        return type(self).finished is not Decider.finished

    def known(self, number: int) -> Sequence[bool | None]:
        """Per video, whether a later step is computed, as far as this is known now; None, or no entry: it is
        not. Must not wait for the device."""
        return ()

    def records(self) -> list[dict[str, Any]]:
        """Measurements so far, as records of the trace (waits for the device)."""
        return []


class ComputeAlways(Decider):
    """Computes every step and keeps nothing."""

    def known(self, number: int) -> list[bool | None]:
        return [True]

    def plan(self, step: Step) -> Plan:
        return Plan()


class Policy(Protocol):
    """Frozen settings of a method. Each request starts a decider of its own.

    A policy that needs no block states so with the attribute `wraps`, see `wraps_of`."""

    @property
    def per_video(self) -> bool:
        """Whether each video of a batch has its own decision."""

    def check(self, sites: ModelSites, num_steps: int) -> None:
        """Raises ValueError if the settings do not fit the model or the schedule."""

    def start(self, sites: ModelSites, num_steps: int, num_videos: int, device: torch.device) -> Decider:
        """The decider of a new request; `num_videos` is 1 where one decision holds for the whole batch.

        Raises:
            ValueError: the settings do not fit the model or the schedule.
        """

    def describe(self) -> dict[str, Any]:
        """The settings, for the trace."""


def wraps_of(policy: Any) -> str:
    """What has to be wrapped for a policy: "blocks" (the default), "model" (the model's own call only), or
    "guided" (that and the step of a pipeline's scheduler)."""
    return str(getattr(policy, "wraps", "blocks"))


def columns_of(sums: Sums) -> list[dict[str, float]]:
    """The sums of each video by column (waits for the device)."""
    names = sum_columns(sums.strides)
    return [dict(zip(names, row, strict=True)) for row in sums.values.tolist()]


def relative_changes(sums: Sums) -> list[float]:
    """sum|r - old| / sum|old| of each video, inf without an old one (waits for the device)."""
    return [row["abs_diff"] / row["abs_old"] if row["abs_old"] else math.inf for row in columns_of(sums)]


def measurement(step: Step, name: str, distances: Sequence[float]) -> dict[str, Any]:
    """A record of the trace."""
    unmeasured = [None] * len(distances)
    return {
        "step": step.number,
        "site": name,
        "distance": [distance if math.isfinite(distance) else None for distance in distances],
        "motion": unmeasured,
        "factor": unmeasured,
        "rate": unmeasured,
        "nonfinite": [not math.isfinite(distance) for distance in distances],
    }


def forced(step: int, num_steps: int) -> bool:
    """Whether AdaCache always computes this step: the first and the last two (published code)."""
    return step == 1 or step >= num_steps - 1


def check_steps(num_steps: Any) -> None:
    """Raises ValueError unless `num_steps` is a number of denoising steps."""
    whole(1)(num_steps, "num_steps")


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raises ValueError unless kept tensors can have this dtype."""
    if dtype is not None and dtype not in STORAGE_DTYPES:
        accepted = [str(one) for one in STORAGE_DTYPES]
        raise ValueError(f"cache_dtype: expected one of {accepted} or None, got {dtype!r}")


def dtype_name(dtype: torch.dtype | None) -> str | None:
    """Such as "float16", for traces."""
    return None if dtype is None else str(dtype).removeprefix("torch.")


def described(policy: Any) -> dict[str, Any]:
    """The fields of a policy in JSON's types, for traces."""
    return {
        "policy": type(policy).__name__,
        **{one.name: _in_json(getattr(policy, one.name)) for one in fields(policy)},
    }


def _in_json(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    if isinstance(value, tuple | list):
        return [_in_json(one) for one in value]
    return value


def history(kept: Sequence[int], step: int) -> list[list[float]]:
    """A `Recurrence`: the features of the last computed steps, the newest first."""
    return [[0.0] * i + [1.0] for i in range(1, MOST_KEPT)]


def check_parts(name: str, parts: Any) -> tuple[str, ...]:
    """The names of sub-layers in an iterable. Raises ValueError if there is none, or another value."""
    if isinstance(parts, str) or not isinstance(parts, Iterable):
        raise ValueError(f"{name}: expected names of sub-layers, got {parts!r}")
    found = tuple(parts)
    if not found or not all(isinstance(part, str) for part in found):
        raise ValueError(f"{name}: expected at least one name of a sub-layer, got {list(found)}")
    return found


def check_storage(storage: str, sites: ModelSites) -> None:
    """Raises ValueError unless the model can store residuals this way."""
    if storage not in sites.storage:
        raise ValueError(f"cache: this model supports {list(sites.storage)}, got {storage!r}")


def check_blocks(blocks: Sequence[Any], depth: int) -> None:
    """Raises ValueError unless these are ascending block numbers of a model of this depth."""
    if not blocks:
        raise ValueError("metric_blocks: expected at least one block, got none")
    for block in blocks:
        whole()(block, "metric_blocks")
        if not 0 <= block < depth:
            raise ValueError(f"metric_blocks: expected blocks in 0..{depth - 1}, got {block}")
    if list(blocks) != sorted(set(blocks)):
        raise ValueError(f"metric_blocks: expected ascending blocks without repeats, got {list(blocks)}")

"""AdaCache and motion regularisation (arXiv 2411.02397): the settings, and the schedule they make for one
request.

The rule itself is `adacache_kernels.decide`; here it is only fed and read, without stopping the device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import adacache_kernels
from adacache.policies.base import MetricSite, StackInfo, check_blocks, check_steps, forced

RULES = ("published", "paper")
METRICS = ("l1", "l2", "cosine")
CACHES = ("stack", "sublayer")
CACHE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)


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
        object.__setattr__(self, "strides", tuple(self.strides))
        if not self.strides or any(not isinstance(s, int) or s < 1 for s in self.strides):
            raise ValueError(f"strides: expected whole numbers of at least 1, got {list(self.strides)}")
        if len(self.window) != 2 or {type(edge) for edge in self.window} not in ({int}, {float}):
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
    """Computes a step when the codebook says so: the smaller the distance, the longer the residuals are
    reused.

    Attributes:
        codebook: {threshold: rate}, thresholds ascending; the first threshold above the distance gives the
            number of steps to the next computed one; past all of them, the last rate.
        metric_blocks: blocks whose residual is measured (running mean over them); None: the middle one.
        metric_part: the residual, one of the model's parts: "temporal_attention", "spatial_attention",
            "cross_attention", "mlp" or "cross_attention_mlp" (both in one, as the published code caches them)
            of STDiT3; "attention" of models that attend to all tokens at once; "block" (the residual of a
            whole block) of all others too; None: the model's (temporal) self-attention.
        motion: motion regularisation, or None.
        rule: "published" makes the very decisions of the published code; "paper" follows the paper's
            equations (mean absolute distance over the steps gone by, signed motion gradient, no power).
        metric: "l1", "l2" or "cosine".
        per_video: each video of a batch is decided on its own; False: once for all rows, as published.
        cache: "stack" keeps one residual of the whole stack, "sublayer" one per sub-layer, as published (one
            per block in other models than STDiT3).
        cache_dtype: storage of the kept residuals: float32, bfloat16, float16 or, for the stack's,
            float8_e4m3fn with a scale for each token; None: the tokens' dtype.
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
        object.__setattr__(self, "codebook", dict(self.codebook))
        check_codebook(self.codebook)
        if self.metric_blocks is not None:
            object.__setattr__(self, "metric_blocks", tuple(self.metric_blocks))
        for name, accepted in (("rule", RULES), ("metric", METRICS), ("cache", CACHES)):
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name}: expected one of {list(accepted)}, got {getattr(self, name)!r}")
        if self.cache_dtype is not None and self.cache_dtype not in CACHE_DTYPES:
            raise ValueError(
                f"cache_dtype: expected one of {[str(d) for d in CACHE_DTYPES]}, got {self.cache_dtype}"
            )
        if self.cache_dtype == torch.float8_e4m3fn and self.cache != "stack":
            raise ValueError(f"cache_dtype: float8_e4m3fn needs cache='stack', got cache={self.cache!r}")

    def sites(self, stack: StackInfo) -> tuple[MetricSite, ...]:
        """The measured sites in the order they run.

        Raises:
            ValueError: the model has no such block or sub-layer.
        """
        part = stack.default_part if self.metric_part is None else self.metric_part
        if part not in stack.parts:
            raise ValueError(f"metric_part: expected one of {list(stack.parts)}, got {part!r}")
        blocks = (max(0, stack.depth // 2 - 1),) if self.metric_blocks is None else self.metric_blocks
        check_blocks(blocks, stack.depth)
        return tuple(MetricSite(block, kind, part) for block in blocks for kind in stack.kinds[part])

    def check(self, num_steps: int, stack: StackInfo) -> None:
        check_steps(num_steps)
        self.sites(stack)
        if self.motion is not None:
            self.motion.steps(num_steps)

    def start(
        self, num_steps: int, num_videos: int, stack: StackInfo, device: torch.device
    ) -> AdaCacheSchedule:
        self.check(num_steps, stack)
        return AdaCacheSchedule(self, num_steps, num_videos, self.sites(stack), device)

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
            "cache_dtype": None if self.cache_dtype is None else str(self.cache_dtype).removeprefix("torch."),
        }


class AdaCacheSchedule:
    """AdaCache at work on one request: the state of the rule lives on the device, a copy follows it to the
    host."""

    def __init__(
        self,
        policy: AdaCache,
        num_steps: int,
        num_videos: int,
        sites: tuple[MetricSite, ...],
        device: torch.device,
    ):
        self.policy = policy
        self.num_steps = num_steps
        self.sites = sites
        motion = policy.motion
        first, last = (1, num_steps) if motion is None else motion.steps(num_steps)
        self._rule: dict[str, Any] = {
            "num_steps": num_steps,
            "thresholds": _sent(list(policy.codebook), device),
            "rates": _sent(list(policy.codebook.values()), device),
            "metric": policy.metric,
            "rule": policy.rule,
            "window": (first, last),
            "scale": 0.0 if motion is None else motion.scale,
            "power": 1.0 if motion is None else motion.power,
            "divisor": 1.0 if motion is None else motion.divisor,
            "gradient_weight": 0.0 if motion is None else motion.gradient_weight,
        }
        self._state = adacache_kernels.initial_state(num_videos, len(sites), rule=policy.rule, device=device)
        self._columns = adacache_kernels.state_columns(len(sites))
        self._host = _HostCopy(self._state)
        self._copies: list[tuple[int, int, _HostCopy]] = []

    @property
    def strides(self) -> tuple[int, ...]:
        return (1,) if self.policy.motion is None else tuple(self.policy.motion.strides)

    @property
    def metric(self) -> str:
        return self.policy.metric

    def computes(self, step: int) -> list[bool]:
        next_step = self._host.read()[:, self._columns.index("next_step")]
        return [forced(step, self.num_steps) or int(due) == step for due in next_step.tolist()]

    def measured(self, site: int, step: int, sums: Tensor, *, frames: int, elements: float) -> None:
        strides = measurable_strides(self.strides, frames)
        # A clip too short for any stride has no motion to measure, and is not regularised.
        rule = self._rule if strides else {**self._rule, "scale": 0.0}
        adacache_kernels.decide(
            sums, self._state, step=step, site=site, frames=frames, strides=strides, elements=elements, **rule
        )
        self._host = _HostCopy(self._state)
        if step > 1:
            self._copies.append((site, step, self._host))

    def measurements(self) -> list[dict[str, Any]]:
        names = ("distance", "motion", "factor", "rate", "nonfinite")
        records = []
        for site, step, copy in self._copies:
            columns = dict(zip(self._columns, copy.read().T.tolist(), strict=True))
            decided = [int(last) == step for last in columns["last_step"]]
            record: dict[str, Any] = {"step": step, "site": str(self.sites[site])}
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
    """A float64 tensor that reaches the device on its own: one made there would make the host wait."""
    return torch.tensor(values, dtype=torch.float64).to(device, non_blocking=True)


class _HostCopy:
    """A snapshot of a small device tensor that arrives on the host on its own; `read` waits for it if it
    must."""

    def __init__(self, tensor: Tensor):
        if tensor.is_cuda:
            self._values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._values.copy_(tensor, non_blocking=True)
            self._arrived: torch.cuda.Event | None = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(tensor.device))
        else:
            self._values, self._arrived = tensor.clone(), None

    def read(self) -> Tensor:
        if self._arrived is not None:
            self._arrived.synchronize()
            self._arrived = None
        return self._values


def measurable_strides(strides: Sequence[int], frames: int) -> tuple[int, ...]:
    """The strides that fit into a clip of so many latent frames."""
    return tuple(stride for stride in strides if stride < frames)


def check_codebook(codebook: Mapping[float, int]) -> None:
    """Raises ValueError unless the codebook has ascending positive thresholds and whole rates of at least
    1."""
    if not codebook:
        raise ValueError("codebook: expected at least one {threshold: rate}, got an empty one")
    thresholds = list(codebook)
    if any(isinstance(t, bool) or not isinstance(t, int | float) or not t > 0 for t in thresholds):
        raise ValueError(f"codebook: expected positive thresholds, got {thresholds}")
    if thresholds != sorted(thresholds):
        raise ValueError(f"codebook: expected ascending thresholds, got {thresholds}")
    for threshold, rate in codebook.items():
        if isinstance(rate, bool) or not isinstance(rate, int) or rate < 1:
            raise ValueError(
                f"codebook: expected whole rates of at least 1, got {rate!r} at threshold {threshold}"
            )

"""`adacache calibrate`: finds a codebook for a model and a sampler from a few full runs.

One run per prompt computes every step and keeps some tokens of the metric residual and of the stack's. What
any codebook would have computed is then simulated from them, and so is what its reused steps would have been
off by; the best one is run for real on prompts that it was not chosen on. Minutes, and no gradient.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adacache.handle import disable, enable
from adacache.policies import AdaCache, MetricSite, StackInfo, preset
from adacache.policies.adacache import measurable_strides
from adacache.policies.base import check_steps
from adacache.request import Call

Doubles = NDArray[np.float64]

TOKENS = 512
"""Tokens per video that are kept of each residual, by default."""
LADDERS: tuple[tuple[int, ...], ...] = (
    (6, 5, 4, 3, 2, 1),
    (3, 2, 1),
    (2, 1),
    (4, 3, 2, 1),
    (4, 2, 1),
    (5, 3, 2, 1),
    (8, 6, 4, 2, 1),
    (10, 8, 6, 4, 3, 2, 1),
    (12, 9, 6, 4, 2),
    (6, 4, 2),
    (4, 3, 2),
    (3, 2),
    (3,),
    (4,),
    (5,),
)
"""Rates that are tried, from the smallest distance to the greatest."""
SHAPES = (0.5, 1.0, 2.0)
"""Powers of the even spacing of a ladder's thresholds that are tried."""
SCALES = np.geomspace(0.003, 10.0, 240)
"""Greatest thresholds that are tried."""


@dataclass(frozen=True)
class Subject:
    """What is calibrated.

    Attributes:
        model: a model or pipeline that `enable` takes.
        generate: (prompt, seed) -> the final latent or video of one prompt.
        num_steps: of the sampler.
        name: for the file.
    """

    model: Any
    generate: Callable[[Any, int], Tensor]
    num_steps: int
    name: str


@dataclass(frozen=True)
class Recording:
    """What the metric site and the stack showed while all of N steps were computed, of V videos."""

    distances: Doubles
    """[V, N, N]: relative distance of step j's metric residual from that of step i < j (0-based)."""
    motion: Doubles
    """[V, N]: motion of the metric residual between frames."""
    losses: Doubles
    """[V, N, N]: distance of step j's stack residual from that of step i, relative to step j's."""

    def __add__(self, other: Recording) -> Recording:
        pairs = zip(
            (self.distances, self.motion, self.losses),
            (other.distances, other.motion, other.losses),
            strict=True,
        )
        return Recording(*(np.concatenate(pair) for pair in pairs))

    @property
    def num_steps(self) -> int:
        return int(self.motion.shape[1])

    def computed(self, policy: AdaCache) -> NDArray[np.bool_]:
        """Steps that each video would compute, bool [V, N], were the residuals those of the recording."""
        regularisation: dict[str, Any] = {}
        if policy.motion is not None:
            names = ("scale", "power", "divisor", "gradient_weight")
            regularisation = {name: getattr(policy.motion, name) for name in names}
            regularisation["window"] = policy.motion.steps(self.num_steps)
        rates = list(policy.codebook.values())
        return self.computed_by([list(policy.codebook)], [rates], **regularisation)[0]

    def computed_by(self, thresholds: Any, rates: Any, **regularisation: Any) -> NDArray[np.bool_]:
        """The same for many codebooks of one length, bool [codebooks, V, N]."""
        from adacache_kernels import engine

        return engine.simulate(self.distances, self.motion, thresholds, rates, **regularisation)[0]

    def loss(self, computed: NDArray[np.bool_]) -> Doubles:
        """Mean over the steps of what reused ones are off by, for schedules [..., V, N] -> [...]."""
        steps = np.arange(self.num_steps)
        source = np.maximum.accumulate(np.where(computed, steps, 0), axis=-1)
        videos = np.arange(len(self.motion))[:, None]
        off = np.where(computed, 0.0, self.losses[videos, source, steps])
        mean: Doubles = off.mean(axis=(-2, -1))
        return mean

    def even_loss(self, count: float) -> float:
        """The loss of computing every so many steps, with as many computed in all; between whole numbers, on
        the line between their losses."""
        counts, losses = [float(self.num_steps)], [0.0]
        for rate in range(2, self.num_steps):
            schedule = even_schedule(self.num_steps, rate)
            if schedule.sum() < counts[-1]:
                counts.append(float(schedule.sum()))
                losses.append(float(self.loss(np.broadcast_to(schedule, self.motion.shape))))
        return float(np.interp(count, counts[::-1], losses[::-1]))


def even_schedule(num_steps: int, rate: int) -> NDArray[np.bool_]:
    """Every `rate`-th step from the second, and the last two."""
    computed = np.zeros(num_steps, dtype=bool)
    computed[0] = True
    computed[1::rate] = True
    computed[-2:] = True
    return computed


@dataclass(frozen=True)
class Record:
    """A policy that computes every step and keeps some tokens of its residuals, for `Recording`.

    Attributes:
        metric_block, metric_part: what is looked at, as for `AdaCache`.
        tokens: kept per video.
    """

    metric_block: int | None = None
    metric_part: str | None = None
    tokens: int = TOKENS
    cache: str = "stack"
    cache_dtype: torch.dtype | None = None
    per_video: bool = True
    schedules: list[RecordSchedule] = field(default_factory=list)
    """One per request, in order."""

    def sites(self, stack: StackInfo) -> tuple[MetricSite, ...]:
        blocks = None if self.metric_block is None else [self.metric_block]
        return AdaCache(codebook={1.0: 1}, metric_blocks=blocks, metric_part=self.metric_part).sites(stack)[
            :1
        ]

    def check(self, num_steps: int, stack: StackInfo) -> None:
        check_steps(num_steps)
        self.sites(stack)

    def start(
        self, num_steps: int, num_videos: int, stack: StackInfo, device: torch.device
    ) -> RecordSchedule:
        self.schedules.append(RecordSchedule(self.sites(stack), num_videos, self.tokens))
        return self.schedules[-1]

    def describe(self) -> dict[str, Any]:
        return {"policy": "Record", "metric_block": self.metric_block, "metric_part": self.metric_part}


class RecordSchedule:
    """`Record` at work on one request."""

    strides: tuple[int, ...] = (1,)
    metric = "l1"

    def __init__(self, sites: tuple[MetricSite, ...], num_videos: int, tokens: int):
        self.sites = sites
        self._num_videos = num_videos
        self._tokens = tokens
        self._frames = 1
        self._kept: dict[str, list[Tensor]] = {"metric": [], "stack": []}

    def computes(self, step: int) -> list[bool]:
        return [True] * self._num_videos

    def measured(self, site: int, step: int, sums: Tensor, *, frames: int, elements: float) -> None:
        self._frames = frames

    def measurements(self) -> list[dict[str, Any]]:
        return []

    def observe(self, call: Call, caches: dict[Any, Tensor]) -> None:
        """Takes samples of the residuals that a call has left in the caches."""
        if call.branch != 0:
            return
        rows = len(call.computing)
        for name in self._kept:
            found = [cache for key, cache in caches.items() if key[:2] in ((name, 0), (0, name))]
            if found:
                self._kept[name].append(self._sample(found[0], rows))

    def _sample(self, residual: Tensor, rows: int) -> Tensor:
        """Some places of all frames: [rows, T, places, C] float32 on the host."""
        channels, frames = residual.shape[-1], self._frames
        if residual.shape[0] == rows:
            r = residual.reshape(rows, frames, -1, channels)
        else:  # rows of places, each with its frames
            r = residual.reshape(rows, -1, frames, channels).transpose(1, 2)
        places = r.shape[2]
        count = max(1, min(places, self._tokens // frames))
        index = torch.linspace(0, places - 1, count, device=r.device).round().long()
        return r[:, :, index].float().cpu()

    def recording(self) -> Recording:
        """What was seen. Row b of a batch belongs to video b % V.

        Raises:
            RuntimeError: the request did not run all of its steps.
        """
        if not self._kept["metric"]:
            raise RuntimeError("recording: the request ended before a step had run")

        def by_video(name: str) -> Tensor:
            # [N, rows, ...] -> [V, N, rows of a video, T, places, C]
            return torch.stack(self._kept[name]).unflatten(1, (-1, self._num_videos)).movedim(2, 0)

        metric = by_video("metric")
        # Where residuals are kept block by block, the measured one stands for them.
        stack = by_video("stack") if len(self._kept["stack"]) == len(self._kept["metric"]) else metric
        distances, motion = compare(metric)
        backwards, _ = compare(stack.flip(1))
        losses = np.flip(backwards, (1, 2)).transpose(0, 2, 1)
        return Recording(distances, motion, np.ascontiguousarray(losses))


def compare(residuals: Tensor) -> tuple[Doubles, Doubles]:
    """Distances [V, N, N] and motion [V, N] of residuals [V, N, rows, T, places, C], as the ops measure
    them."""
    r = residuals.flatten(4)
    videos, steps = r.shape[:2]
    size = r.abs().sum((2, 3, 4), dtype=torch.float64)
    distances = torch.full((videos, steps, steps), torch.nan, dtype=torch.float64)
    for i in range(steps - 1):
        difference = (r[:, i + 1 :] - r[:, i : i + 1]).abs().sum((2, 3, 4), dtype=torch.float64)
        distances[:, i, i + 1 :] = difference / size[:, i : i + 1]
    motion = torch.zeros((videos, steps), dtype=torch.float64)
    if measurable_strides((1,), r.shape[3]):
        later, earlier = r[:, :, :, 1:], r[:, :, :, :-1]
        motion = (later - earlier).abs().sum((2, 3, 4), dtype=torch.float64)
        motion /= (later.abs() + earlier.abs()).sum((2, 3, 4), dtype=torch.float64)
    return distances.numpy(), motion.numpy()


def record(
    subject: Subject, prompts: Sequence[Any], seeds: Sequence[int], policy: Record
) -> tuple[Recording, list[Tensor]]:
    """One full run per prompt: what was seen, and what came out."""
    outputs, recordings = [], []
    for prompt, seed in zip(prompts, seeds, strict=True):
        policy.schedules.clear()
        outputs.append(run(subject, policy, prompt, seed)[0])
        # A pipeline with two transformers, or one that makes a long video in parts, has several requests.
        recordings += [schedule.recording() for schedule in policy.schedules[:1]]
    policy.schedules.clear()
    together = recordings[0]
    for recording in recordings[1:]:
        together = together + recording
    return together, outputs


def run(subject: Subject, policy: Any, prompt: Any, seed: int) -> tuple[Tensor, int]:
    """One run under a policy: the output, and the number of computed steps."""
    handle = enable(subject.model, policy, num_steps=subject.num_steps)
    try:
        output = subject.generate(prompt, seed)
        return output, len(handle.trace.computed_steps)
    finally:
        disable(subject.model)


def candidates() -> list[tuple[Doubles, NDArray[np.int64]]]:
    """Codebooks by length: thresholds and rates [codebooks, entries]."""
    found = []
    for ladder in LADDERS:
        entries = len(ladder)
        thresholds = []
        for shape in SHAPES if entries > 1 else SHAPES[:1]:
            spacing = (np.arange(1, entries) / max(1, entries - 1)) ** shape
            thresholds += [[*(float(f"{s * scale:.3g}") for s in spacing), 1e9] for scale in SCALES]
            if entries == 1:
                thresholds = thresholds[:1]
        rows = np.unique(np.array(thresholds), axis=0)
        rows = rows[(np.diff(rows, axis=1) > 0).all(axis=1)]
        found.append((rows, np.broadcast_to(np.array(ladder), rows.shape).copy()))
    return found


def choose(recording: Recording, *, share: float | None = None, error: float | None = None) -> AdaCache:
    """The candidate of the least loss among those that compute at most `share` of the steps, or the one of
    the fewest computed steps among those whose loss is at most `error`; of equal ones, that in the middle.

    Raises:
        ValueError: not one of the two is given, or no candidate reaches it.
    """
    if (share is None) == (error is None):
        raise ValueError(f"share: expected either share or error, got share={share}, error={error}")
    books, shares, losses = [], [], []
    for thresholds, rates in candidates():
        computed = recording.computed_by(thresholds, rates)
        books += list(zip(thresholds, rates, strict=True))
        shares.append(computed.mean(axis=(1, 2)))
        losses.append(recording.loss(computed))
    kept, loss = np.concatenate(shares), np.concatenate(losses)
    if share is not None:
        first, second, wanted = loss, kept, kept <= share + 1e-9
    else:
        assert error is not None
        first, second, wanted = kept, loss, loss <= error + 1e-12
    if not wanted.any():
        goal = f"share={share}" if share is not None else f"error={error}"
        name = goal.partition("=")[0]
        raise ValueError(f"{name}: no codebook reaches {goal} of {recording.num_steps} steps")
    order = [int(i) for i in np.lexsort((second, first)) if wanted[i]]
    best = order[0]
    equal = [i for i in order if np.allclose((first[i], second[i]), (first[best], second[best]), rtol=1e-9)]
    chosen_thresholds, chosen_rates = books[sorted(equal)[len(equal) // 2]]
    pairs = zip(chosen_thresholds, chosen_rates, strict=True)
    return AdaCache(codebook={float(threshold): int(rate) for threshold, rate in pairs})


@dataclass(frozen=True)
class Outcome:
    """What a codebook was predicted to do and did, on prompts that it was not chosen on (means over them)."""

    predicted_steps: float
    steps: float
    predicted_loss: float
    error: float
    """mean|output - full output| / mean|full output|."""
    gain: float
    """1 - the predicted loss over that of even spacing with as many computed steps: how much better than not
    looking at the video. 0 if all steps are computed."""


def judge(
    subject: Subject,
    policy: AdaCache,
    recording: Recording,
    prompts: Sequence[Any],
    seeds: Sequence[int],
    outputs: Sequence[Tensor],
) -> Outcome:
    """Runs a codebook for real on held-out prompts, of which the full runs are given."""
    computed = recording.computed(policy)
    steps, errors = [], []
    for prompt, seed, full in zip(prompts, seeds, outputs, strict=True):
        output, count = run(subject, policy, prompt, seed)
        steps.append(count)
        errors.append(float((output - full).abs().mean() / full.abs().mean()))
    predicted = float(computed.sum(axis=1).mean())
    loss, even = float(recording.loss(computed)), recording.even_loss(predicted)
    return Outcome(
        predicted, float(np.mean(steps)), loss, float(np.mean(errors)), 1 - loss / even if even else 0.0
    )


def calibrate(
    subject: Subject,
    prompts: Sequence[Any],
    held_out: Sequence[Any],
    *,
    share: float | None = None,
    error: float | None = None,
    like: str | AdaCache | None = None,
    seed: int = 0,
    recorder: Record | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Finds a codebook, and judges it and a known one on held-out prompts.

    Args:
        prompts, held_out: whatever `subject.generate` takes; the codebook is chosen on the first.
        share: of the steps that is to be computed at most; error: the loss that is allowed (see
            `Recording.loss`); or like: a codebook whose share is to be kept. One of the three.
        seed: of the first prompt's noise; the next ones count on.
        recorder: how the runs are recorded.
        say: takes a line for everything that was found.

    Returns:
        What `write` writes: `codebook`, `num_steps`, `metric_part`, and `held_out`, the `Outcome` of the
        codebook and of the known one as dicts.

    Raises:
        ValueError: too few prompts, or no codebook does what is asked.
    """
    if not prompts or not held_out:
        raise ValueError(
            f"prompts: expected some to choose on and some held out, got {len(prompts)}, {len(held_out)}"
        )
    recorder = Record() if recorder is None else recorder
    seeds = list(range(seed, seed + len(prompts) + len(held_out)))
    known = AdaCache(codebook=preset("open-sora/fast", 30).codebook)
    if isinstance(like, AdaCache):
        known = like
    elif like is not None:
        known = AdaCache(codebook=preset(like, None).codebook)
    recording, _ = record(subject, prompts, seeds[: len(prompts)], recorder)
    if like is not None:
        share = float(recording.computed(known).mean())
    chosen = choose(recording, share=share, error=error)
    say(f"{len(prompts)} full runs of {subject.num_steps} steps; chosen: {dict(chosen.codebook)}")

    kept, outputs = record(subject, held_out, seeds[len(prompts) :], recorder)
    found = {}
    for name, policy in (("chosen", chosen), ("known", known)):
        real = AdaCache(codebook=policy.codebook, metric_part=recorder.metric_part)
        outcome = judge(subject, real, kept, held_out, seeds[len(prompts) :], outputs)
        found[name] = outcome
        say(
            f"{name}, on {len(held_out)} held-out prompts: {outcome.steps:.1f} computed steps "
            f"({outcome.predicted_steps:.1f} predicted), error {outcome.error:.4f} "
            f"({outcome.predicted_loss:.4f} predicted per step), {100 * outcome.gain:.0f} % better than even "
            "spacing"
        )
    return {
        "made_by": "adacache calibrate",
        "model": subject.name,
        "num_steps": subject.num_steps,
        "metric_part": recorder.metric_part,
        "codebook": [[threshold, rate] for threshold, rate in chosen.codebook.items()],
        "prompts": len(prompts),
        "held_out": {name: vars(outcome) for name, outcome in found.items()},
    }


def write(path: str | Path, found: dict[str, Any]) -> None:
    """Writes a calibration as the JSON that `enable` takes by path."""
    Path(path).write_text(json.dumps(found, indent=1) + "\n")


def subject_of(
    name: str, num_steps: int | None = None, arguments: dict[str, Any] | None = None
) -> tuple[Subject, list[Any]]:
    """What a name on the command line stands for, and prompts that come with it.

    Args:
        name: "digits"; a directory that a diffusers pipeline was saved in; or "module:function", a function
            that takes the number of steps (or None) and returns a `Subject` and a list of prompts.
        num_steps: of the sampler; None: 30 for the digit model, 50 for a pipeline.
        arguments: of the pipeline's call, besides the prompt.

    Raises:
        ValueError: the name is none of these.
    """
    if name == "digits":
        from adacache.digits.calibrate import digit_subject

        return digit_subject(num_steps or 30)
    if Path(name).is_dir():
        return _saved_pipeline(name, num_steps or 50, arguments or {}), []
    module, separator, function = name.partition(":")
    if not separator:
        raise ValueError(
            f'model: expected "digits", the directory of a saved diffusers pipeline or "module:function", '
            f"got {name!r}"
        )
    found: tuple[Subject, list[Any]] = getattr(importlib.import_module(module), function)(num_steps)
    return found


def _saved_pipeline(path: str, num_steps: int, arguments: dict[str, Any]) -> Subject:
    diffusers = importlib.import_module("diffusers")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(path, local_files_only=True)
    if torch.cuda.is_available():
        pipeline.to("cuda")

    def generate(prompt: str, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        output: Tensor = pipeline(
            prompt=prompt,
            num_inference_steps=num_steps,
            generator=generator,
            output_type="latent",
            **arguments,
        ).frames
        return output

    return Subject(pipeline, generate, num_steps, type(pipeline).__name__)

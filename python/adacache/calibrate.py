"""`adacache calibrate`: finds a codebook for a model and a sampler from a few full runs.

One run per prompt computes every step and keeps some tokens of the metric residual and of the stack's. A few
more runs that reuse in one part of the schedule only show how much the output suffers there. What any
codebook would have computed, and what its output would have been off by, is then simulated from them; the
best one is run for real on prompts that it was not chosen on. Minutes, and no gradient.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adacache.handle import disable, enable
from adacache.policies import AdaCache, MetricSite, Replay, StackInfo, preset
from adacache.policies.adacache import measurable_strides
from adacache.policies.base import check_steps
from adacache.request import Call

Doubles = NDArray[np.float64]

TOKENS = 512
"""Tokens per video that are kept of each residual, by default."""
LADDERS: tuple[tuple[int, ...], ...] = (
    (6, 5, 4, 3, 2, 1),
    (10, 8, 6, 4, 3, 2, 1),
    (8, 6, 4, 2, 1),
    (5, 3, 2, 1),
    (4, 3, 2, 1),
    (4, 2, 1),
    (3, 2, 1),
    (2, 1),
    (12, 9, 6, 4, 2),
    (6, 4, 2),
    (4, 3, 2),
    (3, 2),
    (8, 5, 3),
    (6, 4, 3),
    (5, 4, 3),
    (4, 3),
    (8, 6, 4),
    (6, 4),
    (5, 4),
    (8, 6),
    *((rate,) for rate in (2, 3, 4, 5, 6, 8)),
)
"""Rates that are tried, from the smallest distance to the greatest."""
SHAPES = (0.5, 1.0, 2.0)
"""Powers of the even spacing of a ladder's thresholds that are tried."""
SCALES = np.geomspace(0.003, 10.0, 240)
"""Greatest thresholds that are tried."""
PARTS = 5
"""Parts of the schedule that are told apart in what reusing there does to the output."""
PROBED = 2
"""Prompts that this is looked at with, by default."""


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
    products: Doubles
    """[V, N, N]: inner products of the stack residuals of two steps; the mean square of one is 1."""
    sensitivity: Doubles | None = None
    """[N]: what the output is off by, for a step whose stack residual is off by 1; None: not known, 1 / N."""

    def __add__(self, other: Recording) -> Recording:
        """The videos of both; what is known of the sensitivity is not kept."""
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

    def errors(self, computed: NDArray[np.bool_]) -> Doubles:
        """What the output of each video is off by, relative to it, for schedules [..., V, N]: [..., V].

        Reused steps add the differences of their residuals, times the sensitivity, to the output, where they
        may cancel: its error is the norm of the sum. Without a sensitivity, it is that of the mean residual.
        """
        steps = np.arange(self.num_steps)
        source = np.maximum.accumulate(np.where(computed, steps, 0), axis=-1)
        known = 1 / self.num_steps if self.sensitivity is None else self.sensitivity
        sensitivity = np.broadcast_to(known, computed.shape)
        # A sum over the residuals of all steps: each counts where it was used, less where it belongs.
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


def even_schedule(num_steps: int, count: int) -> NDArray[np.bool_]:
    """`count` computed steps at even distances, the first and (of several) the last among them."""
    computed = np.zeros(num_steps, dtype=bool)
    computed[np.linspace(0, num_steps - 1, count).round().astype(int)] = True
    return computed


def replay(schedule: NDArray[np.bool_]) -> Replay:
    """A schedule [N] as a policy."""
    return Replay([int(step) + 1 for step in np.flatnonzero(schedule)])


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
        return Recording(*compare(metric), inner_products(stack))


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


def inner_products(residuals: Tensor) -> Doubles:
    """Inner products [V, N, N] of residuals [V, N, ...], such that the mean square of one is 1."""
    r = residuals.flatten(2).double()
    products = r @ r.mT
    squares = products.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    return (products / squares.clamp(min=torch.finfo(torch.float64).tiny)).numpy()


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


def difference(output: Tensor, full: Tensor) -> float:
    """mean|output - full| / mean|full|."""
    return float((output - full).abs().mean() / full.abs().mean())


def probe(
    subject: Subject,
    prompts: Sequence[Any],
    seeds: Sequence[int],
    outputs: Sequence[Tensor],
    recording: Recording,
) -> Recording:
    """The recording with a sensitivity, from runs that reuse two of three steps in one part of the schedule.

    Args:
        prompts, seeds: of the recording's first runs; outputs: of these runs.
    """
    steps = recording.num_steps
    parts = [part for part in np.array_split(np.arange(1, steps), PARTS) if len(part) > 1]

    def tried(reused: NDArray[np.int64], sensitivity: Doubles) -> float:
        """The output's error over the one that is predicted."""
        schedule = np.ones(steps, dtype=bool)
        schedule[reused] = False
        errors = [
            difference(run(subject, replay(schedule), prompt, seed)[0], full)
            for prompt, seed, full in zip(prompts, seeds, outputs, strict=True)
        ]
        known = replace(recording, sensitivity=sensitivity)
        predicted = known.errors(np.broadcast_to(schedule, recording.motion.shape))[: len(prompts)].mean()
        return float(np.mean(errors) / predicted) if predicted else 0.0

    if not parts or not prompts:
        return recording
    reused = [np.array([step for i, step in enumerate(part) if i % 3]) for part in parts]
    sensitivity = np.zeros(steps)
    for part, some in zip(parts, reused, strict=True):
        sensitivity[part] = tried(some, np.ones(steps))
    sensitivity[parts[-1][-1] :] = sensitivity[parts[-1][-1]]  # parts of a single step were left out
    sensitivity *= tried(np.concatenate(reused), sensitivity)
    return replace(recording, sensitivity=sensitivity)


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


def scale(recording: Recording, known: AdaCache, share: float) -> AdaCache:
    """A codebook with its thresholds multiplied, such that it computes at least `share` of the steps and as
    few more as can be; of equal ones, that of the least loss."""
    thresholds, rates = np.array(list(known.codebook)), np.array(list(known.codebook.values()))
    books = np.outer(np.geomspace(100, 0.001, 600), thresholds)
    computed = recording.computed_by(books, np.broadcast_to(rates, books.shape).copy())
    shares = computed.mean(axis=(1, 2))
    enough = shares >= share - 1e-9
    order = np.lexsort((recording.loss(computed), np.where(enough, shares, 2.0)))
    best = books[order[0]]
    return AdaCache(codebook={float(f"{t:.3g}"): int(rate) for t, rate in zip(best, rates, strict=True)})


@dataclass(frozen=True)
class Outcome:
    """What a codebook was predicted to do and did, on prompts that it was not chosen on (means over them)."""

    predicted_steps: float
    steps: float
    predicted_error: float
    error: float
    """mean|output - full output| / mean|full output|."""
    even_error: float
    """The same of as many computed steps at even distances."""
    gain: float
    """1 - error / even_error: how much better than not looking at the video. 0 if nothing is off."""


def judge(
    subject: Subject,
    policy: AdaCache,
    recording: Recording,
    prompts: Sequence[Any],
    seeds: Sequence[int],
    outputs: Sequence[Tensor],
    known_even: dict[tuple[int, int], float],
) -> Outcome:
    """Runs a codebook for real on held-out prompts, of which the full runs are given. `known_even` keeps the
    error of evenly spaced steps by seed and their number, for the next codebook."""
    computed = recording.computed(policy)
    steps, errors, even_errors = [], [], []
    for prompt, seed, full in zip(prompts, seeds, outputs, strict=True):
        output, count = run(subject, policy, prompt, seed)
        steps.append(count)
        errors.append(difference(output, full))
        if (seed, count) not in known_even:
            even = replay(even_schedule(subject.num_steps, count))
            known_even[seed, count] = difference(run(subject, even, prompt, seed)[0], full)
        even_errors.append(known_even[seed, count])
    error, even_error = float(np.mean(errors)), float(np.mean(even_errors))
    return Outcome(
        float(computed.sum(axis=1).mean()),
        float(np.mean(steps)),
        float(recording.loss(computed)),
        error,
        even_error,
        1 - error / even_error if even_error else 0.0,
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
    probed: int = PROBED,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Finds a codebook, and judges it and a known one on held-out prompts, this also with its thresholds
    multiplied such that it computes as many steps on these.

    Args:
        prompts, held_out: whatever `subject.generate` takes; the codebook is chosen on the first.
        share: of the steps that is to be computed at most; error: what the output may be off by, as predicted
            (see `Recording.loss`); or like: a codebook whose share is to be kept. One of the three.
        seed: of the first prompt's noise; the next ones count on.
        recorder: how the runs are recorded.
        probed: prompts with which it is found out where reusing harms the output most (`probe`), six runs
            each.
        say: takes a line for everything that was found.

    Returns:
        What `write` writes: `codebook`, `num_steps`, `metric_part`, and `held_out`, the `Outcome` of the
        codebook ("chosen"), of the known one ("known") and of this with other thresholds ("scaled") as dicts.

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
    recording, full = record(subject, prompts, seeds[: len(prompts)], recorder)
    recording = probe(subject, prompts[:probed], seeds[:probed], full[:probed], recording)
    if like is not None:
        share = float(recording.computed(known).mean())
    chosen = choose(recording, share=share, error=error)
    say(f"{len(prompts)} full runs of {subject.num_steps} steps; chosen: {dict(chosen.codebook)}")

    kept, outputs = record(subject, held_out, seeds[len(prompts) :], recorder)
    kept = replace(kept, sensitivity=recording.sensitivity)
    found, known_even = {}, dict[tuple[int, int], float]()
    scaled = scale(kept, known, float(kept.computed(chosen).mean()))
    for name, policy in (("chosen", chosen), ("known", known), ("scaled", scaled)):
        real = AdaCache(codebook=policy.codebook, metric_part=recorder.metric_part)
        outcome = judge(subject, real, kept, held_out, seeds[len(prompts) :], outputs, known_even)
        found[name] = outcome
        say(
            f"{name}, on {len(held_out)} held-out prompts: {outcome.steps:.1f} computed steps "
            f"({outcome.predicted_steps:.1f} predicted), error {outcome.error:.4f} "
            f"({outcome.predicted_error:.4f} predicted); {outcome.even_error:.4f} at even distances"
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

"""Runs of a model: full ones, ones that reuse in one part of the schedule, ones with a codebook."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adacache.api import disable, enable
from adacache.calibration.recording import Doubles, Record, Recording
from adacache.policies import AdaCache, Replay

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


def even_schedule(num_steps: int, count: int) -> NDArray[np.bool_]:
    """`count` computed steps at even distances, the first and (of several) the last among them."""
    computed = np.zeros(num_steps, dtype=bool)
    computed[np.linspace(0, num_steps - 1, count).round().astype(int)] = True
    return computed


def replay(schedule: NDArray[np.bool_]) -> Replay:
    """A schedule [N] as a policy."""
    return Replay([int(step) + 1 for step in np.flatnonzero(schedule)])


def record(
    subject: Subject, prompts: Sequence[Any], seeds: Sequence[int], policy: Record
) -> tuple[Recording, list[Tensor]]:
    """One full run per prompt: what was seen, and what came out."""
    outputs, recordings = [], []
    for prompt, seed in zip(prompts, seeds, strict=True):
        policy.deciders.clear()
        outputs.append(run(subject, policy, prompt, seed)[0])
        # A pipeline with two transformers, or one that makes a long video in parts, has several requests.
        recordings += [decider.recording() for decider in policy.deciders[:1]]
    policy.deciders.clear()
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
    """Runs a codebook on held-out prompts whose full runs are given.

    Args:
        known_even: errors of evenly spaced steps by seed and number of steps, for the next codebook.
    """
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


def subject_of(
    name: str, num_steps: int | None = None, arguments: dict[str, Any] | None = None
) -> tuple[Subject, list[Any]]:
    """What a name on the command line stands for, and prompts that come with it.

    Args:
        name: a directory that a diffusers pipeline was saved in; or "module:function", a function
            that takes the number of steps (or None) and returns a `Subject` and a list of prompts.
        num_steps: of the sampler; None: 50 for a pipeline.
        arguments: of the pipeline's call, besides the prompt.

    Raises:
        ValueError: the name is none of these.
    """
    if Path(name).is_dir():
        return _saved_pipeline(name, num_steps or 50, arguments or {}), []
    module, separator, function = name.partition(":")
    if not separator:
        raise ValueError(
            f'model: expected the directory of a saved diffusers pipeline or "module:function", got {name!r}'
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

# SPDX-License-Identifier: Apache-2.0
"""Runs of a model: full runs, runs that reuse steps in one segment of the schedule, runs with a codebook."""

from __future__ import annotations

import importlib
import inspect
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
from adacache.checks import refuse, text, whole
from adacache.policies import AdaCache, Replay

PARTS = 5
"""Segments of the schedule with a separate sensitivity estimate."""
PROBED = 2
"""Default number of prompts used to estimate the sensitivity."""


@dataclass(frozen=True)
class Subject:
    """The model and sampler to calibrate.

    Attributes:
        model: a model or pipeline that `enable` takes.
        generate: (prompt, seed) -> the final latent or video of one prompt.
        num_steps: steps of the sampler.
        name: written to the file.
        scheduler: the sampler calls its `step(output, timestep, sample, ...)`; None: that of the pipeline.
            Calibration of a planned path needs it.
        generate_with: (prompt, seed, num_steps) -> `generate` with another number of steps; None: unknown.
        peak: largest minus smallest value of clips of pixels, for PSNR; None: `generate` returns latents, and
            the range is measured.
    """

    model: Any
    generate: Callable[[Any, int], Tensor]
    num_steps: int
    name: str
    scheduler: Any = None
    generate_with: Callable[[Any, int, int], Tensor] | None = None
    peak: float | None = None

    @property
    def sampler(self) -> Any:
        """The scheduler.

        Raises:
            ValueError: there is none.
        """
        scheduler = self.scheduler if self.scheduler is not None else getattr(self.model, "scheduler", None)
        if not hasattr(scheduler, "step"):
            raise ValueError(
                "scheduler: expected an object with a method step(output, timestep, sample), "
                f"got {type(scheduler).__name__}"
            )
        return scheduler

    def __post_init__(self) -> None:
        whole(1)(self.num_steps, "num_steps")
        text()(self.name, "name")


def even_schedule(num_steps: int, count: int) -> NDArray[np.bool_]:
    """A schedule of `count` evenly spaced computed steps, with the first and (if count > 1) the last step."""
    computed = np.zeros(num_steps, dtype=bool)
    computed[np.linspace(0, num_steps - 1, count).round().astype(int)] = True
    return computed


def replay(schedule: NDArray[np.bool_]) -> Replay:
    """A schedule [N] as a policy."""
    return Replay([int(step) + 1 for step in np.flatnonzero(schedule)])


def record(
    subject: Subject, prompts: Sequence[Any], seeds: Sequence[int], policy: Record
) -> tuple[Recording, list[Tensor]]:
    """One full run per prompt: the recording and the outputs."""
    outputs, recordings = [], []
    for prompt, seed in zip(prompts, seeds, strict=True):
        policy.deciders.clear()
        outputs.append(run(subject, policy, prompt, seed)[0])
        # A pipeline with two transformers, or one that generates a long video in parts, has several requests.
        recordings.append(policy.deciders[0].recording())
    policy.deciders.clear()
    together = recordings[0]
    for recording in recordings[1:]:
        together = together + recording
    return together, outputs


def run(subject: Subject, policy: Any, prompt: Any, seed: int) -> tuple[Tensor, int]:
    """One run with a policy: the output and the number of computed steps."""
    handle = enable(subject.model, policy, num_steps=subject.num_steps)
    try:
        output = subject.generate(prompt, seed)
        if not isinstance(output, Tensor):
            refuse("generate", "a tensor", output)
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
    """Estimates the sensitivity from runs that reuse two of three steps in one segment of the schedule.

    Args:
        prompts, seeds, outputs: those of the first runs of the recording.

    Returns:
        The recording with its sensitivity.
    """
    steps = recording.num_steps
    parts = [part for part in np.array_split(np.arange(1, steps), PARTS) if len(part) > 1]

    def measured_ratio(reused: NDArray[np.int64], sensitivity: Doubles) -> float:
        """Measured output error / predicted error."""
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
        sensitivity[part] = measured_ratio(some, np.ones(steps))
    sensitivity[parts[-1][-1] :] = sensitivity[parts[-1][-1]]  # parts of a single step were left out
    sensitivity *= measured_ratio(np.concatenate(reused), sensitivity)
    return replace(recording, sensitivity=sensitivity)


@dataclass(frozen=True)
class Outcome:
    """Predicted and measured results of a codebook on held-out prompts (means)."""

    predicted_steps: float
    steps: float
    predicted_error: float
    error: float
    """mean|output - full output| / mean|full output|."""
    even_error: float
    """Error of a schedule with as many computed steps, evenly spaced."""
    gain: float
    """1 - error / even_error: improvement over even spacing; 0 if the latter has no error."""


def judge(
    subject: Subject,
    policy: AdaCache,
    recording: Recording,
    prompts: Sequence[Any],
    seeds: Sequence[int],
    outputs: Sequence[Tensor],
    known_even: dict[tuple[int, int], float],
) -> Outcome:
    """Runs a codebook on held-out prompts and compares with their full runs.

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
    name: str,
    num_steps: int | None = None,
    arguments: dict[str, Any] | None = None,
    *,
    decoded: bool = False,
) -> tuple[Subject, list[Any]]:
    """The subject that a name stands for, and its prompts.

    Args:
        name: the folder of a saved diffusers pipeline, or "module:function": a function that takes the number
            of steps (or None) and returns a `Subject` and a list of prompts.
        num_steps: steps of the sampler; None: 50 for a pipeline.
        arguments: further arguments of the pipeline's call.
        decoded: a pipeline generates clips [1, T, C, H, W] in 0 .. 1; otherwise latents.

    Raises:
        ValueError: the name is neither, or the function does not return these.
    """
    if Path(name).is_dir():
        return _saved_pipeline(name, 50 if num_steps is None else num_steps, arguments or {}, decoded), []
    module, separator, function = name.partition(":")
    if not separator:
        refuse("model", 'the folder of a saved diffusers pipeline or "module:function"', name)
    made = getattr(importlib.import_module(module), function, None)
    if not callable(made):
        refuse("model", f"a function of the module {module}", function)
    match made(num_steps):
        case (Subject() as subject, list(prompts)):
            return subject, prompts
        case other:
            refuse("model", f"a Subject and a list of prompts from {name}", other)


def _check_arguments(pipeline: Any, arguments: dict[str, Any]) -> None:
    accepted = set(inspect.signature(pipeline.__call__).parameters)
    given = {"prompt", "num_inference_steps", "generator", "output_type"}
    for name in arguments:
        if name in given:
            refuse("arguments", f"none of {', '.join(sorted(given))}, which are passed already", name)
        if name not in accepted:
            refuse("arguments", f"arguments of {type(pipeline).__name__}", name)


def _saved_pipeline(path: str, num_steps: int, arguments: dict[str, Any], decoded: bool) -> Subject:
    diffusers = importlib.import_module("diffusers")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(path, local_files_only=True)
    if torch.cuda.is_available():
        pipeline.to("cuda")
    _check_arguments(pipeline, arguments)

    def generate_with(prompt: str, seed: int, steps: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        output = pipeline(
            prompt=prompt,
            num_inference_steps=steps,
            generator=generator,
            output_type="pt" if decoded else "latent",
            **arguments,
        )
        frames: Tensor = output.frames
        return frames

    return Subject(
        pipeline,
        lambda prompt, seed: generate_with(prompt, seed, num_steps),
        num_steps,
        type(pipeline).__name__,
        generate_with=generate_with,
        peak=1.0 if decoded else None,
    )

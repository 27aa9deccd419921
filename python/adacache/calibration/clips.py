# SPDX-License-Identifier: Apache-2.0
"""Full runs of the calibration prompts, and runs with planned paths on the same prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adacache.api import disable, enable
from adacache.calibration.runs import Subject
from adacache.calibration.trajectory import Trajectory, trajectory
from adacache.calibration.windows import Doubles

DIMENSIONS = 1024
"""Outputs are projected to this many numbers."""


@dataclass
class Clip:
    """A prompt and its full run."""

    prompt: Any
    seed: int
    full: Trajectory

    @property
    def start(self) -> Tensor:
        return self.full.states[0]

    def run(self, subject: Subject, given: Any, stop: int | None = None) -> Trajectory:
        return trajectory(subject, self.prompt, self.seed, given=given, forms=self.full.forms, stop=stop)


def projected(clips: Sequence[Clip]) -> Doubles:
    """Outputs [P, N, D]. Projection keeps inner products up to noise: each number is added to one of D sums
    with a random sign."""
    count = clips[0].full.outputs[0].numel()
    if count <= DIMENSIONS:
        return np.stack([[flat(v).double().numpy() for v in clip.full.outputs] for clip in clips])
    source = torch.Generator().manual_seed(0)
    place = torch.randint(DIMENSIONS, (count,), generator=source)
    sign = torch.randint(2, (count,), generator=source).float() * 2 - 1

    def project(output: Tensor) -> Doubles:
        sums = torch.zeros(DIMENSIONS).index_add_(0, place, flat(output) * sign)
        found: Doubles = sums.double().numpy()
        return found

    return np.stack([[project(output) for output in clip.full.outputs] for clip in clips])


def cached_run(subject: Subject, clip: Clip, path: Sequence[int], factors: Sequence[float]) -> Trajectory:
    """A run with a path: computed steps from 0, and one factor per step."""
    at = {step: place for place, step in enumerate(path)}

    def given(step: int, before: Sequence[Tensor]) -> Tensor | None:
        if step in at:
            return None
        place = max(p for s, p in at.items() if s < step)
        i, h = path[place], path[place - 1] if place else -1
        return forecast(before, h, i, step, factors[place])

    return clip.run(subject, given)


def forecast(outputs: Sequence[Tensor], h: int, i: int, step: int, factor: float) -> Tensor:
    """The output of a skipped step, from those of the computed steps h < i; h = -1: there is no h."""
    if h < 0 or factor == 0:
        return outputs[i]
    slope = (outputs[i].float() - outputs[h].float()) / (i - h)
    return (outputs[i].float() + factor * (step - i) * slope).to(outputs[i].dtype)


def psnr(output: Tensor, full: Tensor, peak: float) -> float:
    """Peak signal-to-noise ratio in dB; at most 120."""
    return decibel(peak, float((output.double() - full.double()).square().mean()))


def decibel(peak: float, error: float) -> float:
    return min(120.0, 10 * math.log10(peak**2 / error)) if error else 120.0


def flat(value: Tensor) -> Tensor:
    return value.detach().float().cpu().flatten()


def enabled_run(subject: Subject, policy: Any, prompt: Any, seed: int) -> tuple[Tensor, int]:
    """What the subject generates with a policy, and the number of computed steps."""
    handle = enable(subject.model, policy, num_steps=subject.num_steps)
    try:
        output = subject.generate(prompt, seed)
    finally:
        disable(subject.model)
    return output, len(handle.trace.computed_steps)

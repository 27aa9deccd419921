# SPDX-License-Identifier: Apache-2.0
"""The digit model as a subject of `adacache calibrate`."""

from __future__ import annotations

import random
from dataclasses import replace

from torch import Tensor

from adacache.calibration import Subject
from adacache.digits import FPS, SIZE, encode, load, noise, sampler, with_null
from adacache.digits.captions import MOTIONS, Prompt, training_prompts
from adacache.models.rectified_flow import RectifiedFlow
from adacache.models.stdit3 import STDiT3


def subject(num_steps: int | None = None) -> tuple[Subject, list[Prompt]]:
    """The shipped model with `num_steps` (None: 30), and training prompts of all motions in turn."""
    flow = sampler(30 if num_steps is None else num_steps)
    by_motion = calibration_prompts(len(training_prompts()))
    groups = [[prompt for prompt in by_motion if prompt.motion == motion] for motion in MOTIONS]
    prompts = [prompt for turn in zip(*groups, strict=False) for prompt in turn]
    return subject_of_model(load().requires_grad_(False), flow), prompts


def subject_of_model(model: STDiT3, flow: RectifiedFlow) -> Subject:
    """A digit model and its sampler; `generate` returns one clip [1, 1, T, 32, 32] in -1 .. 1."""

    def run(sampler: RectifiedFlow, prompt: Prompt, seed: int) -> Tensor:
        y = with_null(model, encode([prompt]))
        return sampler.sample(model, noise([seed]), y, fps=FPS, height=SIZE, width=SIZE).clamp(-1, 1)

    return Subject(
        model,
        lambda prompt, seed: run(flow, prompt, seed),
        flow.num_steps,
        "digits",
        scheduler=flow,
        generate_with=lambda prompt, seed, steps: run(replace(flow, num_steps=steps), prompt, seed),
        peak=2.0,
    )


def calibration_prompts(per_motion: int, seed: int = 0) -> list[Prompt]:
    """Training prompts, equally many of each motion class, grouped by class."""
    shuffled = training_prompts()
    random.Random(seed).shuffle(shuffled)
    return [p for motion in MOTIONS for p in [p for p in shuffled if p.motion == motion][:per_motion]]

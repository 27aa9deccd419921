"""The digit model as a subject of `adacache calibrate`."""

from __future__ import annotations

import random
from collections.abc import Sequence

from torch import Tensor

from adacache.calibration import Subject
from adacache.digits import FPS, SIZE, encode, load, noise, sampler, with_null
from adacache.digits.captions import MOTIONS, Prompt, training_prompts
from adacache.models.rectified_flow import RectifiedFlow
from adacache.models.stdit3 import STDiT3


def subject(num_steps: int | None = None) -> tuple[Subject, list[Prompt]]:
    """The digit model for `adacache calibrate`, and training prompts of all motions by turns."""
    model = load().requires_grad_(False)
    flow = sampler(num_steps or 30)

    def generate(prompt: Prompt, seed: int) -> Tensor:
        return sample(model, flow, [prompt], [seed])

    by_motion = calibration_prompts(len(training_prompts()))
    groups = [[prompt for prompt in by_motion if prompt.motion == motion] for motion in MOTIONS]
    prompts = [prompt for turn in zip(*groups, strict=False) for prompt in turn]
    return Subject(model, generate, flow.num_steps, "digits"), prompts


def calibration_prompts(per_motion: int, seed: int = 0) -> list[Prompt]:
    """Training prompts, as many of each motion class; none that training held out."""
    shuffled = training_prompts()
    random.Random(seed).shuffle(shuffled)
    return [p for motion in MOTIONS for p in [p for p in shuffled if p.motion == motion][:per_motion]]


def sample(model: STDiT3, flow: RectifiedFlow, prompts: Sequence[Prompt], seeds: Sequence[int]) -> Tensor:
    y = with_null(model, encode(prompts))
    return flow.sample(model, noise(list(seeds)), y, fps=FPS, height=SIZE, width=SIZE).clamp(-1, 1)

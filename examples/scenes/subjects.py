# SPDX-License-Identifier: Apache-2.0
"""The trained models as subjects of `adacache calibrate` and of `benchmarks/methods.py`:

PYTHONPATH=examples adacache calibrate scenes.subjects:wan_unipc --count 12 --out wan_unipc.json
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from adacache.calibration import Subject
from torch import Tensor

from scenes.captions import Prompt, calibration_prompts, evaluation_prompts
from scenes.evaluate import Reader
from scenes.models import STEPS, call_arguments, latte_pipeline, wan_pipeline

PIPELINES: dict[str, Callable[[], Any]] = {
    "wan_euler": functools.partial(wan_pipeline, "euler"),
    "wan_unipc": functools.partial(wan_pipeline, "unipc"),
    "latte": latte_pipeline,
}


def subject(kind: str, num_steps: int | None = None) -> tuple[Subject, list[Prompt]]:
    """A pipeline of `PIPELINES` with `num_steps` (None: 50), and training prompts of all motions in turn."""
    pipeline, steps = PIPELINES[kind](), STEPS if num_steps is None else num_steps

    def generate_with(prompt: Prompt, seed: int, count: int) -> Tensor:
        arguments = {**call_arguments(pipeline, [prompt], [seed]), "num_inference_steps": count}
        frames: Tensor = pipeline(**arguments).frames
        return frames.clamp(-1, 1)

    found = Subject(
        pipeline,
        lambda prompt, seed: generate_with(prompt, seed, steps),
        steps,
        kind,
        generate_with=generate_with,
        peak=2.0,
    )
    prompts = calibration_prompts(2)
    return found, prompts[::2] + prompts[1::2]


def wan_euler(num_steps: int | None = None) -> tuple[Subject, list[Prompt]]:
    """The Wan network with Euler steps."""
    return subject("wan_euler", num_steps)


def wan_unipc(num_steps: int | None = None) -> tuple[Subject, list[Prompt]]:
    """The Wan network with UniPC."""
    return subject("wan_unipc", num_steps)


def latte(num_steps: int | None = None) -> tuple[Subject, list[Prompt]]:
    """The Latte network with DDIM."""
    return subject("latte", num_steps)


def benchmark(kind: str, clips: int, num_steps: int) -> tuple[Any, ...]:
    """Subject, test clips (prompt, motion, seed), tuning clips (prompt, seed) and judge of
    `benchmarks/methods.py`."""
    found, prompts = subject(kind, num_steps)
    tests = evaluation_prompts(max(1, clips // 12))
    reader = Reader()

    def judge(video: Tensor, wanted: Sequence[Prompt]) -> dict[str, float]:
        report = reader.report(video, wanted)
        return {"digit accuracy": report.digit_accuracy, "speed correlation": report.speed_correlation}

    with_seeds = [(prompt, prompt.motion, 1000 + number) for number, prompt in enumerate(tests)]
    tuning = [(prompt, 500 + number) for number, prompt in enumerate(prompts[-12:])]
    return found, with_seeds, tuning, judge

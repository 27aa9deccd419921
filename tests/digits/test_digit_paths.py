# SPDX-License-Identifier: Apache-2.0
"""The shipped planned paths of the digit model, in a real run through `enable`."""

from __future__ import annotations

import adacache
import pytest
from adacache.calibration import calibrate_paths, psnr
from adacache.digits import FPS, PATHS, SIZE, encode, load, noise, sampler, with_null
from adacache.digits.captions import held_out_prompts
from adacache.digits.subject import subject
from adacache.models.stdit3 import STDiT3
from adacache.policies import PlannedPath
from torch import Tensor

PROMPT = held_out_prompts()[3]


@pytest.fixture(scope="module")
def model() -> STDiT3:
    return load().requires_grad_(False)


def generate(model: STDiT3, num_steps: int = 30) -> Tensor:
    y = with_null(model, encode([PROMPT]))
    return sampler(num_steps).sample(model, noise([5]), y, fps=FPS, height=SIZE, width=SIZE).clamp(-1, 1)


def test_three_times_fewer_steps_are_close_to_all(model: STDiT3) -> None:
    full, fewer = generate(model), generate(model, 10)
    handle = adacache.enable(model, PATHS, num_steps=30, speedup=3)
    planned = generate(model)
    adacache.disable(model)
    assert len(handle.trace.computed_steps) == 10
    assert psnr(planned, full, 2.0) > 40
    assert psnr(planned, full, 2.0) > psnr(fewer, full, 2.0) + 5


@pytest.mark.parametrize("budget", [15, 12, 10, 8, 6])
def test_every_budget_is_a_path(budget: int) -> None:
    policy = adacache.planned(PATHS, budget=budget)
    assert isinstance(policy, PlannedPath)
    assert len(policy.computed) == budget
    assert policy.origin.model == "STDiT3"


@pytest.mark.slow
def test_refitted_factors_of_the_stack() -> None:
    """Factors of the guided output fit the residual of the stack badly."""
    found, prompts = subject()
    paths = calibrate_paths(found, prompts[:2], [], budgets=[10], probed=2, refine=1, level="stack")
    budget = paths.budgets[10]
    assert budget.fit.startswith("stack, refitted")
    assert budget.calibration[budget.fit] > budget.calibration["stack"] + 1

# SPDX-License-Identifier: Apache-2.0
"""The benchmark of budgets per video: the choice of budgets, the paths with a shared start, and a run."""

from __future__ import annotations

import itertools
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from adacache.calibration.clips import Clip
from adacache.calibration.trajectory import trajectory
from adacache.digits.captions import Prompt
from adacache.digits.subject import subject_of_model
from adacache.models.rectified_flow import RectifiedFlow
from tool_loading import load

STEPS = 8


@pytest.fixture
def choice(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(monkeypatch, "benchmarks/budget_choice.py")


def test_best_choice_is_the_best_of_all(choice: ModuleType) -> None:
    budgets = [4, 5, 7]
    source = np.random.default_rng(3)
    for _ in range(20):
        errors = np.exp(source.normal(size=(5, 3)))
        chosen = choice.best_choice(errors, budgets, 5.0)
        assert sum(budgets[k] for k in chosen) <= 25
        sums = {
            one: errors[np.arange(5), list(one)].sum()
            for one in itertools.product(range(3), repeat=5)
            if sum(budgets[k] for k in one) <= 25
        }
        assert sums[tuple(chosen)] == pytest.approx(min(sums.values()))
    with pytest.raises(ValueError, match="mean: expected at least the smallest budget 4"):
        choice.best_choice(errors, budgets, 3.9)


def test_run_measures_the_error_of_a_path(choice: ModuleType, tiny_digit_model: Any) -> None:
    subject = subject_of_model(tiny_digit_model, RectifiedFlow(num_steps=STEPS, guidance_scale=2.0))
    prompt = Prompt(3, "racing", "left", "noisy")
    clip = Clip(prompt, 7, trajectory(subject, prompt, 7))
    final, _, norm = choice.run(subject, clip, range(STEPS), [0.0] * STEPS, 3)
    assert final == 0
    assert norm == pytest.approx(float((clip.full.outputs[2].double() ** 2).mean()))
    path, factors = [0, 2, 4], [0.0, 0.5, 0.8]
    final, error, _ = choice.run(subject, clip, path, factors, 3)
    outputs: list[Any] = []

    def given(step: int, before: Any) -> Any:
        if step in path:
            return None
        at = max(one for one in path if one < step)
        if at == 0:
            return before[0]
        factor = factors[path.index(at)]
        return before[at] + factor * (step - at) / 2 * (before[at] - before[at - 2])

    slow = trajectory(subject, prompt, 7, given=given, forms=clip.full.forms)
    outputs = slow.outputs
    forecast = outputs[2] + 0.5 * (outputs[2] - outputs[0])
    assert error == pytest.approx(float(((outputs[4] - forecast).double() ** 2).mean()))
    assert final == pytest.approx(float(((slow.states[-1] - clip.full.states[-1]).double() ** 2).mean()))
    assert final > 0

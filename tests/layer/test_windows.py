# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of path calibration, against explicit sums."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from adacache.calibration.clips import psnr
from adacache.calibration.planning import default_budgets, probed_steps
from adacache.calibration.windows import MOST_FACTOR, Windows, path_windows


def windows(num_steps: int = 9, clips: int = 3, longest: int = 9, seed: int = 0) -> Windows:
    """Outputs that change smoothly from step to step."""
    source = np.random.default_rng(seed)
    walk = source.standard_normal((clips, num_steps, 7)).cumsum(1).cumsum(1) * 0.1
    return Windows(walk, source.uniform(0.5, 2.0, num_steps), longest)


def final_change(w: Windows, path: list[int], factors: list[float]) -> np.ndarray:
    """sum over skipped steps of s_k (forecast - true output), [P, D]."""
    total = np.zeros_like(w.outputs[:, 0])
    for step in range(w.num_steps):
        if step in path:
            continue
        place = max(p for p, one in enumerate(path) if one < step)
        i = path[place]
        forecast = w.outputs[:, i].copy()
        if place:
            h = path[place - 1]
            forecast += factors[place] * (step - i) / (i - h) * (w.outputs[:, i] - w.outputs[:, h])
        total += w.sensitivity[step] * (forecast - w.outputs[:, step])
    return total


PATHS = [[0, 1, 3, 6], [0, 4], [0, 2, 3, 4, 8], [0]]


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_terms_add_up(path: list[int]) -> None:
    w = windows()
    factors = [0.3 * place for place in range(len(path))]
    total = sum(
        a + factor * b
        for (a, b), factor in zip(
            (w.terms(*one) for one in path_windows(path, w.num_steps)), factors, strict=True
        )
    )
    expected = final_change(w, path, factors)
    np.testing.assert_allclose(total, expected, rtol=1e-12)
    np.testing.assert_allclose(w.remaining(path, factors), (expected**2).sum(1), rtol=1e-12)


def test_factor_of_one_window_is_optimal() -> None:
    w = windows()
    a, b = w.terms(1, 2, 7)
    errors = {f: ((a + f * b) ** 2).sum() for f in np.linspace(0, MOST_FACTOR, 301)}
    assert w.factor(1, 2, 7) == pytest.approx(min(errors, key=lambda f: errors[f]), abs=0.011)
    assert w.factor(-1, 0, 5) == 0.0


def test_cost_of_each_window() -> None:
    w = windows(longest=4)
    cost = w.cost()
    for h, i, j in itertools.product(range(-1, 9), range(9), range(1, 10)):
        allowed = i < j <= i + 4 and (h == -1 if i == 0 else max(0, i - 4) <= h < i)
        if not allowed:
            if h < i < j:
                assert cost[h, i, j] == np.inf
            continue
        a, b = w.terms(h, i, j)
        assert cost[h, i, j] == pytest.approx(((a + w.factor(h, i, j) * b) ** 2).sum(1).mean())


@pytest.mark.parametrize("path", PATHS[:3], ids=str)
@pytest.mark.parametrize("ridge", [0.05, 1.0])
@pytest.mark.parametrize("known", [(), (0.0, 2.0)], ids=["none_known", "two_known"])
def test_joint_factors_minimize_the_sum(path: list[int], ridge: float, known: tuple[float, ...]) -> None:
    w = windows()
    fitted = list(enumerate(path_windows(path, w.num_steps)))[len(known) :]
    places = [p for p, (h, i, j) in fitted if h >= 0 and j > i + 1]
    alone = [w.factor(*one) for one in path_windows(path, w.num_steps)]
    size = [(w.terms(*one)[1] ** 2).sum() for one in path_windows(path, w.num_steps)]

    def objective(factors: list[float]) -> float:
        pull = sum(size[p] * (factors[p] - alone[p]) ** 2 for p in places)
        return float((final_change(w, path, factors) ** 2).sum() + ridge * pull)

    found = w.joint_factors(path, ridge, known)
    assert tuple(found[: len(known)]) == known
    assert all(found[p] == 0 for p in range(len(known), len(path)) if p not in places)
    for place in places:
        for change in (-1e-3, 1e-3):
            moved = [*found[:place], found[place] + change, *found[place + 1 :]]
            assert objective(moved) > objective(found)


def test_paths_are_distinct_and_the_first_is_optimal() -> None:
    w = windows(num_steps=12, longest=12)
    cost = w.cost()
    found = w.paths(cost, 5, 6)
    every = [[0, *rest] for rest in itertools.combinations(range(1, 12), 4)]
    assert w.total(cost, found[0]) == pytest.approx(min(w.total(cost, path) for path in every))
    assert 1 < len(found) <= 6
    assert len({tuple(path) for path in found}) == len(found)
    assert len({path[1] for path in found}) > 1
    assert len({path[-1] for path in found}) > 1
    assert found == w.paths(cost, 5, 6)


def test_defaults() -> None:
    assert default_budgets(30) == [15, 12, 10, 8, 6]
    assert default_budgets(4) == [2]
    assert probed_steps(30) == [1, 2, 4, 8, 9, 15, 20, 25, 28]
    assert probed_steps(2) == []


def test_psnr() -> None:
    import torch

    a = torch.zeros(4)
    assert psnr(a + 0.2, a, 2.0) == pytest.approx(20.0, abs=1e-4)
    assert psnr(a, a, 2.0) == 120.0

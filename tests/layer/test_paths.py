# SPDX-License-Identifier: Apache-2.0
"""Path planners against exhaustive search."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from adacache.calibration.paths import (
    computing,
    forecast_cost,
    minimax,
    reuse_cost,
    shortest,
    shortest_with_memory,
)

PLANNERS = {shortest: 2, minimax: 2, shortest_with_memory: 3}
"""Axes of the cost of each planner."""
SEEDS = range(40)


def random_cost(seed: int, axes: int) -> tuple[Any, int]:
    """A cost tensor and the number of computed steps. Some cases have many ties or forbidden edges; entries
    that no planner reads are NaN."""
    rng = np.random.default_rng(seed)
    end = int(rng.integers(1, 9))
    cost = rng.random((end + 1,) * axes)
    if seed % 3 == 1:
        cost = np.floor(4 * cost)
    if seed % 3 == 2:
        cost[rng.random(cost.shape) < 0.3] = np.inf
    steps = np.arange(end + 1)
    cost[..., steps[:, None] >= steps] = np.nan
    return cost, int(rng.integers(1, end + 1))


def paths(end: int, computed: int) -> Iterator[list[int]]:
    return ([0, *rest] for rest in itertools.combinations(range(1, end), computed - 1))


def edges_of(cost: Any, path: list[int]) -> list[float]:
    """The costs of a path's edges."""
    ends = [*path, len(cost) - 1]
    if cost.ndim == 2:
        return [float(cost[i, j]) for i, j in itertools.pairwise(ends)]
    return [float(cost[h, i, j]) for h, i, j in zip([-1, *ends], ends, ends[1:], strict=False)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("planner", "axes"), [(shortest, 2), (shortest_with_memory, 3)])
def test_smallest_sum(planner: Callable[..., Any], axes: int, seed: int) -> None:
    cost, computed = random_cost(seed, axes)
    best = min(sum(edges_of(cost, path)) for path in paths(len(cost) - 1, computed))
    if best == math.inf:
        with pytest.raises(ValueError, match="cost: expected a path of"):
            planner(cost, computed)
        return
    path, total = planner(cost, computed)
    assert path in list(paths(len(cost) - 1, computed))
    assert sum(edges_of(cost, path)) == pytest.approx(total)
    assert total == pytest.approx(best)


@pytest.mark.parametrize("seed", SEEDS)
def test_smallest_sorted_costs(seed: int) -> None:
    cost, computed = random_cost(seed, 2)
    best = min(sorted(edges_of(cost, path), reverse=True) for path in paths(len(cost) - 1, computed))
    if best[0] == math.inf:
        with pytest.raises(ValueError, match="cost: expected a path of"):
            minimax(cost, computed)
        return
    path, costs = minimax(cost, computed)
    assert path in list(paths(len(cost) - 1, computed))
    assert costs == best == sorted(edges_of(cost, path), reverse=True)


def test_memory_changes_the_path() -> None:
    """A cost that ignores the previous step gives the path of the two-index planner; a cost that depends on
    it gives another path."""
    rng = np.random.default_rng(3)
    plain = rng.random((10, 10))
    cost = np.broadcast_to(plain, (10, 10, 10)).copy()
    path, total = shortest(plain, 4)
    assert shortest_with_memory(cost, 4) == (path, pytest.approx(total))
    cost[path[1], path[2]] += 5.0
    other, _ = shortest_with_memory(cost, 4)
    assert other != path
    for seed in SEEDS:
        before = random_cost(seed, 3)[0]
        after = before.copy()
        shortest_with_memory(np.nan_to_num(after, nan=1.0, posinf=9.0), 1)
        assert np.array_equal(before, after, equal_nan=True), "the cost is not modified"


@pytest.mark.parametrize("planner", PLANNERS)
def test_steps_that_must_be_computed(planner: Callable[..., Any]) -> None:
    cost = np.random.default_rng(0).random((9,) * PLANNERS[planner])
    limited = computing(cost, [1, 2, 7])
    path, total = planner(limited, 5)
    through = [one for one in paths(8, 5) if {1, 2, 7} <= set(one)]
    assert path in through
    key: Callable[[Any], Any] = max if planner is minimax else sum
    best = min(key(edges_of(cost, one)) for one in through)
    assert (total[0] if planner is minimax else total) == pytest.approx(best)
    assert planner(limited, 8)[0] == list(range(8))
    with pytest.raises(ValueError, match="cost: expected a path of 3 computed steps, got only forbidden"):
        planner(limited, 3)


@pytest.mark.parametrize("planner", PLANNERS)
def test_arguments_are_checked(planner: Callable[..., Any]) -> None:
    axes = PLANNERS[planner]
    cost = np.zeros((4,) * axes)
    for computed in (0, 4, 1.0):
        with pytest.raises(ValueError, match=r"computed: expected a whole number in 1\.\.3, got"):
            planner(cost, computed)
    with pytest.raises(ValueError, match=r"cost: expected \[N \+ 1, .*\] with N of at least 1"):
        planner(cost[:3], 1)
    with pytest.raises(ValueError, match="cost: expected numbers or inf, got NaN or -inf"):
        planner(np.full_like(cost, np.nan), 1)
    with pytest.raises(ValueError, match=r"steps: expected a whole number in 0\.\.2, got 3"):
        computing(cost, [3])


@pytest.mark.parametrize("planner", PLANNERS)
def test_hundred_steps_take_seconds(planner: Callable[..., Any]) -> None:
    cost = np.random.default_rng(0).random((101,) * PLANNERS[planner])
    start = time.perf_counter()
    path, _ = planner(cost, 25)
    assert len(path) == 25
    assert time.perf_counter() - start < 20.0  # 0.1 to 1 s on an idle core


def test_costs_of_features() -> None:
    """Against a term-by-term sum. The forecast error of a feature linear in the step is zero."""
    features = np.random.default_rng(1).random((7, 5))
    reuse, forecast = reuse_cost(features), forecast_cost(features)
    for i, j in itertools.combinations(range(8), 2):
        terms = [np.abs(features[s] - features[i]).mean() for s in range(i + 1, j)]
        assert reuse[i, j] == pytest.approx(sum(terms))
        assert forecast[-1, i, j] == reuse[i, j]
        for h in range(i):
            slope = (features[i] - features[h]) / (i - h)
            terms = [np.abs(features[s] - features[i] - (s - i) * slope).mean() for s in range(i + 1, j)]
            assert forecast[h, i, j] == pytest.approx(sum(terms))
    line = np.arange(9.0)[:, None] * np.ones((9, 3))
    assert shortest_with_memory(forecast_cost(line), 2) == ([0, 1], 0.0)
    assert shortest(reuse_cost(line), 3)[0] == [0, 3, 6]
    assert minimax(reuse_cost(line), 3) == ([0, 3, 6], [3.0, 3.0, 3.0])

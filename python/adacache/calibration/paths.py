# SPDX-License-Identifier: Apache-2.0
"""Offline path planning: which K of N steps to compute, given the cost of each run of skipped steps.

Steps are 0 .. N-1, and N is the end. A path is K computed steps that rise from 0. An edge (i, j), i < j,
computes step i and skips i+1 .. j-1; the last edge of a path ends at N. A cost of inf forbids an edge. All
planners are exact and deterministic.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from adacache.checks import whole

Doubles = NDArray[np.float64]


def shortest(cost: Doubles, computed: int) -> tuple[list[int], float]:
    """The path whose edges have the smallest sum.

    Args:
        cost: [N + 1, N + 1], `cost[i, j]` of the edge (i, j); only i < j is read.
        computed: K, the number of computed steps.

    Returns:
        The computed steps, and the sum of their edges.

    Raises:
        ValueError: the cost has another shape or a NaN, K is not in 1 .. N, or every path is forbidden.
    """
    edges = _edges(cost, 2)
    end = len(edges) - 1
    whole(1, end)(computed, "computed")
    total = np.full(end, np.inf)  # of the best path so far to each step
    total[0] = 0.0
    before: list[NDArray[np.intp]] = []
    for _ in range(computed - 1):
        sums = total[:, None] + edges[:end, :end]
        before.append(sums.argmin(0))
        total = sums.min(0)
    sums = total + edges[:end, end]
    last = int(sums.argmin())
    _check_reached(float(sums[last]), computed)
    path = [last]
    for back in reversed(before):
        path.append(int(back[path[-1]]))
    return path[::-1], float(sums[last])


def shortest_with_memory(cost: Doubles, computed: int) -> tuple[list[int], float]:
    """The path with the smallest sum, where the cost of an edge depends on the computed step before it, as it
    does when skipped steps are forecast from two computed ones (DPCache, arXiv 2602.22654).

    Args:
        cost: [N + 1, N + 1, N + 1], `cost[h, i, j]` of the edge (i, j) if h was computed before i; h = -1
            (the last index, N) if i is the first step. Only h < i < j is read.
        computed: K, the number of computed steps.

    Returns:
        The computed steps, and the sum of their edges.

    Raises:
        ValueError: as `shortest`.

    Takes O(K N^3) time and O(N^3) memory.
    """
    edges = _edges(cost, 3)
    end = len(edges) - 1
    whole(1, end)(computed, "computed")
    total = np.full((end + 1, end), np.inf)  # [h, i], of the best path so far that ends with h, i
    total[-1, 0] = 0.0
    before: list[NDArray[np.intp]] = []
    for _ in range(computed - 1):
        sums = total[:, :, None] + edges[:, :end, :end]
        before.append(sums.argmin(0))
        total = np.full((end + 1, end), np.inf)
        total[:end] = sums.min(0)
    sums = total + edges[:, :end, end]
    h, i = np.unravel_index(int(sums.argmin()), sums.shape)
    _check_reached(float(sums[h, i]), computed)
    path = [int(i), int(h)]
    for back in reversed(before):
        path.append(int(back[path[-1], path[-2]]))
    return path[-2::-1] if computed > 1 else path[:1], float(sums[h, i])


def minimax(cost: Doubles, computed: int) -> tuple[list[int], list[float]]:
    """The path with the smallest largest edge; of those, the one with the smallest second largest edge, and
    so on (LeMiCa, arXiv 2511.00090).

    Args:
        cost, computed: as `shortest`.

    Returns:
        The computed steps, and the costs of their edges, the largest first.

    Raises:
        ValueError: as `shortest`.
    """
    edges = _edges(cost, 2)
    end = len(edges) - 1
    whole(1, end)(computed, "computed")
    # This order of sorted costs does not change when both sides get the same edge, so the best path to a step
    # extends a best path to the step before. Costs are negated, because `bisect` sorts upwards.
    best: dict[int, tuple[list[float], list[int]]] = {0: ([], [0])}
    for count in range(computed):
        found: dict[int, tuple[list[float], list[int]]] = {}
        for j in range(1, end) if count < computed - 1 else [end]:
            for i, (costs, path) in best.items():
                if i >= j or edges[i, j] == math.inf:
                    continue
                longer = costs.copy()
                bisect.insort(longer, -float(edges[i, j]))
                if j not in found or longer > found[j][0]:
                    found[j] = longer, [*path, j]
        best = found
    _check_reached(0.0 if end in best else math.inf, computed)
    costs, path = best[end]
    return path[:-1], [-cost for cost in costs]


def reuse_cost(features: Doubles) -> Doubles:
    """The cost of reusing: cost[i, j] = sum over i < s < j of mean|f_s - f_i|.

    Args:
        features: [N, D], the feature of each step of a run in which all were computed, or a sample of its
            elements.

    Returns:
        [N + 1, N + 1], for `shortest` and `minimax`.
    """
    steps = len(features)
    cost = np.zeros((steps + 1, steps + 1))
    for i in range(steps):
        cost[i, i + 2 :] = np.abs(features[i + 1 :] - features[i]).mean(1).cumsum()
    return cost


def forecast_cost(features: Doubles) -> Doubles:
    """The cost of a linear forecast: cost[h, i, j] = sum over i < s < j of
    mean|f_s - (f_i + (f_i - f_h) * (s - i) / (i - h))|, and that of reusing f_i for h = -1 (DPCache).

    Args:
        features: as `reuse_cost`.

    Returns:
        [N + 1, N + 1, N + 1], for `shortest_with_memory`.
    """
    steps = len(features)
    cost = np.zeros((steps + 1,) * 3)
    cost[-1] = reuse_cost(features)
    for i in range(1, steps):
        change = features[i + 1 :] - features[i]
        ahead = np.arange(1, steps - i)[:, None]
        for h in range(i):
            slope = (features[i] - features[h]) / (i - h)
            cost[h, i, i + 2 :] = np.abs(change - ahead * slope).mean(1).cumsum()
    return cost


def computing(cost: Doubles, steps: Sequence[int]) -> Doubles:
    """The cost in which every edge that skips one of `steps` is forbidden.

    Args:
        cost: [..., N + 1, N + 1] of any planner.
        steps: in 0 .. N-1.
    """
    limited = np.array(cost, dtype=np.float64)
    end = limited.shape[-1] - 1
    for step in steps:
        whole(0, end - 1)(step, "steps")
        limited[..., :step, step + 1 :] = np.inf
    return limited


def _edges(cost: Doubles, axes: int) -> Doubles:
    """The cost with inf where no edge is."""
    edges = np.array(cost, dtype=np.float64)
    if edges.ndim != axes or len(set(edges.shape)) != 1 or len(edges) < 2:
        expected = ", ".join(["N + 1"] * axes)
        raise ValueError(f"cost: expected [{expected}] with N of at least 1, got {list(edges.shape)}")
    steps = np.arange(len(edges))
    edges[..., steps[:, None] >= steps] = np.inf
    if axes == 3:
        edges[:-1][steps[:-1, None] >= steps] = np.inf  # h < i
        edges[-1, 1:] = np.inf  # only step 0 has no step before
    if np.isnan(edges).any() or (edges == -np.inf).any():
        raise ValueError("cost: expected numbers or inf, got NaN or -inf")
    return edges


def _check_reached(total: float, computed: int) -> None:
    if total == math.inf:
        raise ValueError(f"cost: expected a path of {computed} computed steps, got only forbidden ones")

# SPDX-License-Identifier: Apache-2.0
"""The policy protocol on wrapped blocks: tiny policies against reference loops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import adacache
import pytest
import tiny_policies as tiny
import torch
from model_cases import (
    COGVIDEOX,
    COGVIDEOX_SIZE,
    LATTE,
    OPEN_SORA_PLAN_13,
    WAN,
    WAN_SIZE,
    Case,
    relative_error,
)
from test_methods import STEPS, Clock, blocks_replaced, mixed_values, replaced, run_slowly
from test_models import enabled
from tiny_policies import (
    Blocks,
    Delta,
    DeltaOfVideos,
    Mixed,
    OutputsBesideResiduals,
    RangeWatch,
    RangeWatchSlowly,
    TinyPolicy,
)
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

VIDEOS = 3
WAN_8 = replace(WAN, build=lambda: diffusers.WanTransformer3DModel(**{**WAN_SIZE, "num_layers": 8}))
COGVIDEOX_8 = replace(
    COGVIDEOX,
    build=lambda: diffusers.CogVideoXTransformer3DModel(**{**COGVIDEOX_SIZE, "num_layers": 8}),
)
CHECKED = [WAN_8, COGVIDEOX_8, LATTE]
"""Models of eight blocks: the cases of tests with a `case` argument, see conftest.py."""


def run(case: Case, model: nn.Module, policy: Any, values: Any) -> tuple[Tensor, adacache.Request]:
    with enabled(model, policy, STEPS) as handle, handle.request(num_videos=VIDEOS) as request:
        return case.denoise(model, values, STEPS), request


def alone(case: Case, model: nn.Module, values: Any, video: int, rule: Callable[..., list[Tensor]]) -> Tensor:
    """The reference loop for one video: every block runs, and `rule` replaces its output."""
    clock = Clock()
    with blocks_replaced(case, model, lambda *given: rule(clock.step, *given)):
        return run_slowly(case, model, case.rows(values, video), clock)


@pytest.mark.parametrize("storage", ["stack", "block"])
@pytest.mark.sampled(2)
def test_reuse_and_forecast_in_one_step(case: Case, storage: str) -> None:
    model, values = case.model(), mixed_values(case)
    final, request = run(case, model, TinyPolicy(lambda sites, videos: Mixed(sites, videos, storage)), values)
    for video in range(VIDEOS):
        actions = [tiny.mixed_action(step, video) for step in range(1, STEPS + 1)]
        rule = Blocks(lambda step, _, v=video: tiny.mixed_action(step, v))
        expected = alone(case, model, values, video, rule)
        assert relative_error(final[video], expected[0]) < case.tolerance
        computed = [step for step, action in enumerate(actions, 1) if action is tiny.COMPUTE]
        assert request.trace.steps_of(video) == computed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.sampled(2)
def test_forecasts_of_other_dtypes(case: Case, dtype: torch.dtype) -> None:
    model, values = case.model(), mixed_values(case)
    exact, full = run(case, model, TinyPolicy(lambda sites, videos: Mixed(sites, videos, "stack")), values)
    final, half = run(
        case, model, TinyPolicy(lambda sites, videos: Mixed(sites, videos, "stack", dtype)), values
    )
    assert 0 < relative_error(final, exact) < 0.05
    assert half.trace.cache_bytes * 2 == full.trace.cache_bytes


@pytest.mark.parametrize("storage", ["stack", "block"])
@pytest.mark.parametrize(("first", "last"), [(1, 3), (0, 8), (2, 7)])
@pytest.mark.sampled(2)
def test_watched_ranges_of_blocks(case: Case, storage: str, first: int, last: int) -> None:
    model, values, threshold = case.model(), mixed_values(case), 0.5
    policy = TinyPolicy(lambda sites, videos: RangeWatch(sites, videos, first, last, threshold, storage))
    final, request = run(case, model, policy, values)
    decider = request.decider
    assert isinstance(decider, RangeWatch)
    schedules = set()
    for video in range(VIDEOS):
        rule = RangeWatchSlowly(first, last, threshold)
        if case.alternating:
            rule.layout = lambda position, x: x.transpose(0, 1) if position % 2 else x
        expected = alone(case, model, values, video, rule)
        schedules.add(tuple(rule.computed))
        assert request.trace.steps_of(video) == rule.computed
        assert [step for step, _ in decider.distances[video]] == [step for step, _ in rule.distances]
        assert [value for _, value in decider.distances[video]] == pytest.approx(
            [value for _, value in rule.distances], rel=1e-3
        )
        assert relative_error(final[video], expected[0]) < case.tolerance
    assert len(schedules) > 1, "all videos have the same schedule"


@pytest.mark.parametrize("storage", ["stack", "block"])
@pytest.mark.sampled(2)
def test_alternating_ranges(case: Case, storage: str) -> None:
    model, values = case.model(), mixed_values(case)
    final, _ = run(case, model, TinyPolicy(lambda sites, videos: Delta(sites, videos, storage)), values)
    other, request = run(
        case, model, TinyPolicy(lambda sites, videos: DeltaOfVideos(sites, videos, storage)), values
    )
    measured = tiny.measured_steps(STEPS, VIDEOS)
    assert request.decider.measured == measured
    assert 1 < len(measured) < STEPS
    for video in range(VIDEOS):
        expected = alone(case, model, values, video, Blocks(tiny.delta_action))
        assert relative_error(final[video], expected[0]) < case.tolerance

        def action(step: int, position: int, video: int = video) -> Any:
            return tiny.delta_of_videos(step, position, video)

        expected = alone(case, model, values, video, Blocks(action))
        assert relative_error(other[video], expected[0]) < case.tolerance
    assert relative_error(final, other) > 1e-3


@pytest.mark.sampled(2)
def test_sublayer_outputs_and_residuals_per_video(case: Case) -> None:
    model, values = case.model(), {**case.values(2, seed=1)}
    part, child = (
        ("temporal_attention", "attn1") if case is LATTE else ("mlp", "ffn" if case is WAN_8 else "ff")
    )
    policy = TinyPolicy(lambda sites, videos: OutputsBesideResiduals(sites, videos, part))
    with enabled(model, policy, STEPS) as handle, handle.request(num_videos=2):
        final = case.denoise(model, values, STEPS)
    lists = case.lists[-1:] if case is LATTE else case.lists
    children = [block.get_submodule(child) for name, block in case.blocks(model) if name in lists]
    for video in range(2):
        clock = Clock()
        rule = Blocks(lambda step, _, v=video: tiny.beside_action(step, v))

        def reuse(clock: Clock = clock) -> Callable[[Tensor], Tensor]:
            kept: list[Tensor] = []

            def change(output: Tensor) -> Tensor:
                if clock.step in tiny.OUTPUTS_COMPUTED:
                    kept[:] = [output]
                return kept[0]

            return change

        blocks = blocks_replaced(case, model, lambda *given, rule=rule, clock=clock: rule(clock.step, *given))
        with replaced({one: reuse() for one in children}), blocks:
            expected = run_slowly(case, model, case.rows(values, video), clock)
        assert relative_error(final[video], expected[0]) < case.tolerance
        assert relative_error(case.denoise(model, case.rows(values, video), STEPS), expected) > 1e-3


def test_tokens_first_in_mixed_steps() -> None:
    """Blocks with the layout [N, B, C]."""
    case = OPEN_SORA_PLAN_13
    model, values = case.model(), mixed_values(case)
    final, _ = run(case, model, TinyPolicy(lambda sites, videos: Mixed(sites, videos, "stack")), values)
    for video in range(VIDEOS):
        rule = Blocks(lambda step, _, v=video: tiny.mixed_action(step, v))
        expected = alone(case, model, values, video, rule)
        assert relative_error(final[video], expected[0]) < case.tolerance

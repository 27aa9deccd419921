# SPDX-License-Identifier: Apache-2.0
"""The policy protocol on the fused program of STDiT3: minimal policies against reference loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import adacache
import pytest
import tiny_policies as tiny
import torch
from adacache.models.stdit3 import STDiT3
from adacache.policies import Decider, Keep, Plan, Step
from adacache.sites import Site
from models import denoise, inputs, relative_error, rows_of
from test_method_rules import STEPS, run_slowly
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
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

VIDEOS = 3


def values_of_videos() -> dict[str, Tensor]:
    values = inputs(VIDEOS, seed=3)
    values["z"] *= torch.tensor([1.0, 3.0, 0.3]).view(-1, 1, 1, 1, 1)
    return values


def run(model: STDiT3, policy: Any, values: dict[str, Tensor]) -> tuple[Tensor, adacache.Request]:
    handle = adacache.enable(model, policy, num_steps=STEPS)
    try:
        with handle.request(num_videos=values["z"].shape[0]) as request:
            return denoise(model, values, STEPS), request
    finally:
        adacache.disable(model)


def alone(model: STDiT3, values: dict[str, Tensor], video: int, rule: Callable[..., list[Tensor]]) -> Tensor:
    """Reference loop of one video: every block runs, and `rule` replaces its output."""

    def block(step: int, number: int, x: Tensor, run: Callable[[], Tensor]) -> Tensor:
        return rule(step + 1, number, [x], [run()])[0]

    return run_slowly(model, rows_of(values, video), block=block)


@pytest.mark.parametrize("storage", ["stack", "block", "sublayer"])
def test_reuse_and_forecast_in_one_step(model: STDiT3, storage: str) -> None:
    values = values_of_videos()
    final, request = run(model, TinyPolicy(lambda sites, videos: Mixed(sites, videos, storage)), values)
    seen = set()
    for video in range(VIDEOS):
        actions = [tiny.mixed_action(step, video) for step in range(1, STEPS + 1)]
        seen |= set(actions)
        expected = alone(model, values, video, Blocks(lambda step, _, v=video: tiny.mixed_action(step, v)))
        assert relative_error(final[video], expected[0]) < 2e-5
        computed = [step for step, action in enumerate(actions, 1) if action is tiny.COMPUTE]
        assert request.trace.steps_of(video) == computed
    assert len(seen) == 3


@pytest.mark.parametrize("storage", ["stack", "block"])
@pytest.mark.parametrize(("first", "last"), [(1, 3), (0, 8), (2, 7)])
@pytest.mark.sampled(2)
def test_watched_ranges_of_blocks(model: STDiT3, storage: str, first: int, last: int) -> None:
    values, threshold = values_of_videos(), 0.42
    policy = TinyPolicy(lambda sites, videos: RangeWatch(sites, videos, first, last, threshold, storage))
    final, request = run(model, policy, values)
    decider = request.decider
    assert isinstance(decider, RangeWatch)
    schedules = set()
    for video in range(VIDEOS):
        rule = RangeWatchSlowly(first, last, threshold)
        expected = alone(model, values, video, rule)
        schedules.add(tuple(rule.computed))
        assert request.trace.steps_of(video) == rule.computed
        assert [step for step, _ in decider.distances[video]] == [step for step, _ in rule.distances]
        assert [value for _, value in decider.distances[video]] == pytest.approx(
            [value for _, value in rule.distances], rel=1e-3
        )
        assert relative_error(final[video], expected[0]) < 2e-5
    assert len(schedules) > 1, "the schedules of the videos differ"


@pytest.mark.parametrize("storage", ["stack", "block", "sublayer"])
def test_alternating_ranges(model: STDiT3, storage: str) -> None:
    values = values_of_videos()
    final, _ = run(model, TinyPolicy(lambda sites, videos: Delta(sites, videos, storage)), values)
    other, request = run(
        model, TinyPolicy(lambda sites, videos: DeltaOfVideos(sites, videos, storage)), values
    )
    measured = tiny.measured_steps(STEPS, VIDEOS)
    assert request.decider.measured == measured
    assert 1 < len(measured) < STEPS
    for video in range(VIDEOS):
        expected = alone(model, values, video, Blocks(tiny.delta_action))
        assert relative_error(final[video], expected[0]) < 2e-5

        def action(step: int, position: int, video: int = video) -> Any:
            return tiny.delta_of_videos(step, position, video)

        expected = alone(model, values, video, Blocks(action))
        assert relative_error(other[video], expected[0]) < 2e-5
    assert relative_error(final, other) > 1e-3


def test_sublayer_outputs_and_residuals_per_video(model: STDiT3) -> None:
    values = inputs(2, seed=3)
    policy = TinyPolicy(lambda sites, videos: OutputsBesideResiduals(sites, videos, "mlp"))
    final, _ = run(model, policy, values)
    for video in range(2):
        kept: dict[int, Tensor] = {}
        rule = Blocks(lambda step, _, v=video: tiny.beside_action(step, v))

        def output(step: int, time: float, count: int, y: Callable[[], Tensor], kept: Any = kept) -> Tensor:
            if count % 3 != 2:
                return y()
            if step + 1 in tiny.OUTPUTS_COMPUTED:
                kept[count] = y()
            return kept[count]

        def block(step: int, number: int, x: Tensor, run: Callable[[], Tensor], rule: Any = rule) -> Tensor:
            return rule(step + 1, number, [x], [run()])[0]

        expected = run_slowly(model, rows_of(values, video), output, block)
        assert relative_error(final[video], expected[0]) < 2e-5
        assert relative_error(denoise(model, rows_of(values, video), STEPS), expected) > 1e-3


class TokenMoves(TorchDispatchMode):
    """Counts PyTorch ops that gather or scatter rows of token tensors."""

    def __init__(self, rows: int, tokens: int):
        super().__init__()
        self.shape = (rows, tokens)
        self.count = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        moves = ("index_select", "index_copy_", "index_put_", "index", "slice", "copy_")
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if first is not None and first.ndim == 3 and first.shape[:2] == self.shape:
            self.count += op.overloadpacket.__name__ in moves
        return op(*args, **(kwargs or {}))


def test_mixed_steps_gather_and_scatter_in_the_fused_ops(model: STDiT3) -> None:
    values = values_of_videos()
    steps = range(1, STEPS + 1)
    computed = [[step in (1, 9) or step % 3 == video for video in range(VIDEOS)] for step in steps]
    trace = adacache.Trace(STEPS, VIDEOS, {}, computed)
    handle = adacache.enable(model, adacache.Replay(trace), num_steps=STEPS)
    with handle.request(num_videos=VIDEOS), TokenMoves(2 * VIDEOS, 5 * 24) as moves:
        denoise(model, values, STEPS)
    assert [handle.trace.steps_of(v) for v in range(VIDEOS)] == [
        [step for step in steps if computed[step - 1][v]] for v in range(VIDEOS)
    ]
    assert moves.count == 0


@pytest.mark.parametrize(
    ("keeps", "message"),
    [
        ({Site(0, 4): Keep(), Site(3, 6): Keep()}, r"keeps: expected ranges of the 8 blocks .* got \[3, 6\)"),
        ({Site(2, 9): Keep()}, r"keeps: expected ranges of the 8 blocks .* got \[2, 9\)"),
        ({Site(2, 2): Keep()}, r"keeps: expected ranges of the 8 blocks .* got \[2, 2\)"),
    ],
)
def test_kept_ranges_are_checked(model: STDiT3, keeps: dict[Site, Keep], message: str) -> None:
    class Keeping(Decider):
        def __init__(self) -> None:
            self.keeps = keeps

        def plan(self, step: Step) -> Plan:
            return Plan()

    with pytest.raises(ValueError, match=message):
        run(model, TinyPolicy(lambda sites, videos: Keeping()), inputs(1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"factors": 0}, "factors: expected 1..4, got 0"),
        ({"factors": 5}, "factors: expected 1..4, got 5"),
        ({"factors": 2, "dtype": torch.float8_e4m3fn}, "dtype: expected .* got float8_e4m3fn"),
    ],
)
def test_keeps_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Keep(**settings)

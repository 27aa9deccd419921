# SPDX-License-Identifier: Apache-2.0
"""PAB, FirstBlock and TaylorSeer on the fused program of STDiT3, against reference loops that implement their
rules."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import adacache
import pytest
import torch
from adacache.models.stdit3 import Modulation, STDiT3, add_residual
from models import denoise, golden_model, inputs, relative_error, rows_of
from torch import Tensor

STEPS = 14
PARTS = ["spatial_attention", "cross_attention", "mlp", "temporal_attention", "cross_attention", "mlp"]
"""Sub-layers of a pair of blocks, in execution order."""
THRESHOLD = 0.5
"""FirstBlock computes some steps and skips others at this threshold."""


@dataclass
class Forecast:
    """Taylor forecast from features of computed steps, by the definition of divided differences."""

    order: int
    steps: list[int] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)

    def add(self, step: int, feature: Tensor) -> None:
        self.steps.append(step)
        self.features.append(feature.double())

    def factor(self, i: int, at: int = -1) -> Tensor:
        """F_i at computed step `at`, an index into `steps`."""
        if i == 0:
            return self.features[at]
        gap = self.steps[at] - self.steps[at - 1]
        return (self.factor(i - 1, at) - self.factor(i - 1, at - 1)) / gap

    def at(self, step: int) -> Tensor:
        known = min(self.order, len(self.steps) - 1)
        ahead = step - self.steps[-1]
        return sum(
            (self.factor(i) * ahead**i / math.factorial(i) for i in range(known + 1)),
            torch.zeros_like(self.features[-1]),
        )


@torch.no_grad()
def run_slowly(
    model: STDiT3,
    values: dict[str, Tensor],
    output: Callable[[int, float, int, Callable[[], Tensor]], Tensor] | None = None,
    block: Callable[[int, int, Tensor, Callable[[], Tensor]], Tensor] | None = None,
) -> Tensor:
    """Reference loop, with guidance in one batch.

    Args:
        output: (step from 0, timestep, index of the sub-layer, the sub-layer) -> its output.
        block: (step from 0, index of the block, its input, the block) -> its output.
    """
    z = values["z"]
    for step in range(STEPS):
        time = (1 - step / STEPS) * 1000
        rows = torch.cat((z, z))
        tokens, conditioning = model.embed(
            rows, torch.full((len(rows),), time), fps=24.0, height=64, width=96
        )
        conditioning = model.with_captions(conditioning, values["y"], values["mask"])
        count = 0

        def add(
            part: str, x: Tensor, y: Callable[[], Tensor], gate: Tensor | None, norm: Modulation | None
        ) -> tuple[Tensor, Tensor | None]:
            nonlocal count
            assert part == PARTS[count % 6]
            value = y() if output is None else output(step, time, count, y)  # noqa: B023
            count += 1
            return add_residual(part, x, lambda: value, gate, norm)

        for number, (layer, angles) in enumerate(model.stack(conditioning)):

            def run(layer: Any = layer, x: Tensor = tokens, angles: Any = angles) -> Tensor:
                return layer(x, conditioning, angles, add)  # noqa: B023

            tokens = run() if block is None else block(step, number, tokens, run)
        conditional, unconditional = model.unembed(tokens, conditioning)[:, :4].chunk(2)
        z = z + (unconditional + 4.0 * (conditional - unconditional)) / STEPS
    return z


def run(model: STDiT3, policy: Any, values: dict[str, Tensor]) -> tuple[Tensor, adacache.Trace]:
    """Latents and trace of one request."""
    handle = adacache.enable(model, policy, num_steps=STEPS)
    try:
        with handle.request(num_videos=values["z"].shape[0]):
            return denoise(model, values, STEPS), handle.trace
    finally:
        adacache.disable(model)


def count_calls(model: STDiT3, names: list[str]) -> dict[str, int]:
    """Counts further calls of the children of all blocks, by name."""
    calls = dict.fromkeys(names, 0)

    def note(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            calls[name] += 1

        return hook

    for block in (*model.spatial_blocks, *model.temporal_blocks):
        for name in names:
            block.get_submodule(name).register_forward_pre_hook(note(name))
    return calls


@pytest.fixture
def hooks(model: STDiT3) -> Any:
    """Removes forward pre-hooks that a test registers."""
    yield
    for module in model.modules():
        module._forward_pre_hooks.clear()


# PAB.


@pytest.mark.parametrize("ranges", [None, adacache.PAB.FAST, {"mlp": 3, "temporal_attention": 2}])
@pytest.mark.parametrize("window", [(450, 930), (100, 800)])
@pytest.mark.sampled(2)
def test_pab_follows_its_rule(model: STDiT3, ranges: Any, window: tuple[float, float]) -> None:
    values = inputs(2, seed=1)
    by_part = ranges or adacache.PAB.SLOW
    kept: dict[int, Tensor] = {}
    reused = 0

    def output(step: int, time: float, count: int, y: Callable[[], Tensor]) -> Tensor:
        nonlocal reused
        part = PARTS[count % 6]
        if step % by_part.get(part, 1) and window[0] < time < window[1]:
            reused += 1
        else:
            kept[count] = y()
        return kept[count]

    expected = run_slowly(model, values, output)
    final, trace = run(model, adacache.PAB(*([] if ranges is None else [ranges]), window=window), values)
    assert reused > 0
    assert relative_error(denoise(model, values, STEPS), expected) > 1e-3, "no reuse"
    assert relative_error(final, expected) < 1e-5
    assert trace.computed_steps == list(range(1, STEPS + 1)), "the blocks run at every step"
    assert trace.policy["policy"] == "PAB"
    assert trace.num_videos == 1, "one schedule for all videos"


@pytest.mark.usefixtures("hooks")
def test_pab_does_not_run_what_it_reuses(model: STDiT3) -> None:
    calls = count_calls(model, ["attn", "cross_attn", "mlp"])
    run(model, adacache.PAB({"temporal_attention": 4, "cross_attention": 7}, window=(0, 2000)), inputs(1))
    blocks = len(model.temporal_blocks)
    assert calls == {
        "attn": blocks * (STEPS + math.ceil(STEPS / 4)),
        "cross_attn": 2 * blocks * math.ceil(STEPS / 7),
        "mlp": 2 * blocks * STEPS,
    }


def test_pab_computing_every_step_is_bit_identical(model: STDiT3) -> None:
    values = inputs(1)
    always = run(model, adacache.AdaCache(codebook={9.0: 1}), values)[0]
    for policy in (adacache.PAB(dict.fromkeys(PARTS, 1)), adacache.PAB(window=(2000, 3000))):
        with (
            pytest.warns(UserWarning, match="PAB reused nothing")
            if policy.window[0] > 1000
            else contextlib.nullcontext()
        ):
            assert torch.equal(run(model, policy, values)[0], always)


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float32, 0.0), (torch.bfloat16, 0.02), (torch.float16, 0.003), (torch.float8_e4m3fn, 0.1)],
)
def test_pab_keeps_outputs_in_other_dtypes(model: STDiT3, dtype: torch.dtype, bound: float) -> None:
    values = inputs(1)
    plain, full = run(model, adacache.PAB(), values)
    final, trace = run(model, adacache.PAB(cache_dtype=dtype), values)
    error = relative_error(final, plain)
    assert error <= bound
    assert (error > 0) == (bound > 0)
    # Channels: 96. float8 has a float32 scale per token.
    bytes_per_token = {1: 96 + 4}.get(dtype.itemsize, 96 * dtype.itemsize)
    assert trace.cache_bytes * 96 * 4 == full.cache_bytes * bytes_per_token


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ranges": {}}, "ranges: expected at least one name of a sub-layer, got \\[\\]"),
        ({"ranges": "attention"}, "ranges: expected {sub-layer: range}, got 'attention'"),
        ({"ranges": {1: 2}}, "ranges: expected at least one name of a sub-layer, got \\[1\\]"),
        (
            {"ranges": {"attention": 0}},
            "ranges\\['attention'\\]: expected a whole number of at least 1, got 0",
        ),
        ({"ranges": {"attention": 2.0}}, "ranges\\['attention'\\]: expected a whole number"),
        ({"window": (9, 5)}, "window: expected two timesteps 0 <= lo < hi, got \\(9, 5\\)"),
        ({"window": 5}, "window: expected two timesteps"),
        ({"window": (1, 2, 3)}, "window: expected two timesteps"),
        ({"window": (0, math.nan)}, "window: expected two timesteps"),
        ({"window": (0, math.inf)}, "window: expected two timesteps"),
        ({"cache_dtype": torch.int8}, "cache_dtype: expected one of"),
    ],
)
def test_pab_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adacache.PAB(**settings)


def test_pab_needs_a_sublayer_of_the_model(model: STDiT3) -> None:
    with pytest.raises(
        ValueError, match=r"ranges: expected some of .*'temporal_attention'.* got \['attention'\]"
    ):
        adacache.enable(model, adacache.PAB({"attention": 2}), num_steps=STEPS)


# TaylorSeer.


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"order": 0},
        {"order": 2, "interval": 3},
        {"order": 3, "interval": 2, "first": 2},
        {"order": 2, "interval": 4, "first": 3, "phase": 2, "last": 2},
    ],
)
@pytest.mark.parametrize("cache", ["stack", "block", "output"])
@pytest.mark.sampled(2)
def test_taylorseer_follows_its_rule(model: STDiT3, settings: dict[str, Any], cache: str) -> None:
    values = inputs(2, seed=2)
    policy = adacache.TaylorSeer(cache=cache, **settings)
    computed = taylor_steps(policy)
    forecasts: dict[int, Forecast] = {}

    def feature(
        step: int, number: int, compute: Callable[[], Tensor], before: Tensor | None = None
    ) -> Tensor:
        forecast = forecasts.setdefault(number, Forecast(policy.order))
        if step + 1 in computed:
            value = compute()
            forecast.add(step + 1, value if before is None else value - before)
            return value
        value = forecast.at(step + 1).float()
        return value if before is None else before + value

    if cache == "output":
        expected = run_slowly(model, values, lambda step, time, count, y: feature(step, count, y))
    else:
        # The forecast is linear: the forecast of the stack is the sum of the forecasts of its blocks.
        expected = run_slowly(model, values, block=lambda step, number, x, run: feature(step, number, run, x))
    final, trace = run(model, policy, values)
    assert 2 < len(computed) < STEPS
    assert relative_error(denoise(model, values, STEPS), expected) > 1e-4, "no forecast"
    assert relative_error(final, expected) < 2e-5
    assert trace.computed_steps == (list(range(1, STEPS + 1)) if cache == "output" else computed)
    assert trace.policy["order"] == policy.order


def taylor_steps(policy: adacache.TaylorSeer) -> list[int]:
    """Computed steps, by iterating over the schedule."""
    steps, due = [], policy.first + policy.phase
    for step in range(1, STEPS + 1):
        if step == due and step > policy.first:
            due += policy.interval
            steps.append(step)
        elif step <= policy.first or step > STEPS - policy.last:
            steps.append(step)
        if due <= policy.first:
            due += policy.interval
    return steps


def test_taylorseer_schedules() -> None:
    def steps(num_steps: int, **settings: Any) -> list[int]:
        policy = adacache.TaylorSeer(**settings)
        return [i for i in range(1, num_steps + 1) if policy.computes(adacache.policies.Step(i, num_steps))]

    assert steps(16) == [1, 6, 11, 16], "published"
    assert steps(12, first=3, interval=4) == [1, 2, 3, 7, 11]
    assert steps(12, first=3, interval=4, phase=2) == [1, 2, 3, 5, 9]
    assert steps(12, interval=5, last=2) == [1, 6, 11, 12]
    assert steps(6, interval=1) == [1, 2, 3, 4, 5, 6]


@pytest.mark.usefixtures("hooks")
def test_taylorseer_does_not_run_what_it_forecasts(model: STDiT3) -> None:
    calls = count_calls(model, ["attn", "cross_attn", "mlp"])
    policy = adacache.TaylorSeer(cache="output", parts=["temporal_attention", "mlp"], interval=4)
    run(model, policy, inputs(1))
    computed, blocks = len(taylor_steps(policy)), len(model.temporal_blocks)
    assert calls == {
        "attn": blocks * (STEPS + computed),
        "cross_attn": 2 * blocks * STEPS,
        "mlp": 2 * blocks * computed,
    }


@pytest.mark.parametrize("cache", ["stack", "block", "output"])
def test_taylorseer_keeps_factors_in_other_dtypes(model: STDiT3, cache: str) -> None:
    values = inputs(1)
    plain, full = run(model, adacache.TaylorSeer(order=2, cache=cache), values)
    assert full.cache_bytes == 3 * 4 * {"stack": 1, "block": 8, "output": 24}[cache] * 2 * 5 * 24 * 96
    for dtype, bound in ((torch.bfloat16, 0.03), (torch.float16, 0.004)):
        final, trace = run(model, adacache.TaylorSeer(order=2, cache=cache, cache_dtype=dtype), values)
        assert 0 < relative_error(final, plain) < bound
        assert trace.cache_bytes * 2 == full.cache_bytes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"interval": 0}, "interval: expected a whole number of at least 1, got 0"),
        ({"order": -1}, "order: expected a whole number in 0..3, got -1"),
        ({"order": 4}, "order: expected a whole number in 0..3, got 4"),
        ({"first": 0}, "first: expected a whole number of at least 1, got 0"),
        ({"last": -1}, "last: expected a whole number of at least 0, got -1"),
        ({"phase": 5}, "phase: expected 0..4 with this interval, got 5"),
        (
            {"cache": "sublayer"},
            "cache: expected one of \\['stack', 'block', 'output', .*\\], got 'sublayer'",
        ),
        ({"parts": ["mlp"]}, "parts: expected None with cache='stack', got \\['mlp'\\]"),
        ({"cache": "output", "parts": []}, "parts: expected at least one name of a sub-layer, got \\[\\]"),
        ({"cache": "output", "parts": "mlp"}, "parts: expected names of sub-layers, got 'mlp'"),
        ({"cache_dtype": torch.float8_e4m3fn}, "cache_dtype: expected float32, .* got float8_e4m3fn"),
        ({"cache_dtype": torch.int8}, "cache_dtype: expected one of"),
    ],
)
def test_taylorseer_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adacache.TaylorSeer(**settings)


def test_taylorseer_needs_sublayers_of_the_model(model: STDiT3) -> None:
    with pytest.raises(ValueError, match=r"parts: expected some of .*'mlp'.* got \['attention'\]"):
        adacache.enable(
            model, adacache.TaylorSeer(cache="output", parts=["mlp", "attention"]), num_steps=STEPS
        )


# FirstBlock.


def first_block_slowly(
    model: STDiT3, values: dict[str, Tensor], threshold: float
) -> tuple[Tensor, list[int], list[float]]:
    """Latents, computed steps and distances of steps 2, 3, ... for one video."""
    kept: dict[int, Tensor] = {}
    computed: list[int] = []
    distances: list[float] = []

    def block(step: int, number: int, x: Tensor, run: Callable[[], Tensor]) -> Tensor:
        if number == 0:
            after = run()
            residual = (after - x).double()
            if step > 0:
                distances.append(float((residual - kept[0]).abs().mean() / kept[0].abs().mean()))
            if step == 0 or distances[-1] >= threshold:
                kept[0] = residual
                computed.append(step + 1)
            return after
        if computed[-1] == step + 1:
            after = run()
            kept[number] = after - x
            return after
        return x + kept[number]

    return run_slowly(model, values, block=block), computed, distances


@pytest.mark.parametrize("videos", [1, 3])
def test_first_block_follows_its_rule(model: STDiT3, videos: int) -> None:
    values = inputs(videos, seed=3)
    values["z"] *= torch.tensor([1.0, 3.0, 0.3])[:videos].view(-1, 1, 1, 1, 1)
    final, trace = run(model, adacache.FirstBlock(THRESHOLD), values)
    schedules = set()
    for video in range(videos):
        alone = rows_of(values, video)
        expected, computed, distances = first_block_slowly(model, alone, THRESHOLD)
        schedules.add(tuple(computed))
        assert 1 < len(computed) < STEPS, "the schedule is not trivial"
        assert trace.steps_of(video) == computed
        ((site, measured),) = trace.series("distance", video).items()
        assert site == "spatial_blocks.0.block"
        assert [step for step, _ in measured] == list(range(2, STEPS + 1))
        assert [value for _, value in measured] == pytest.approx(distances, rel=1e-3)
        assert relative_error(final[video], expected[0]) < 2e-5
        assert relative_error(denoise(model, alone, STEPS), expected) > 1e-4, "no reuse"
    assert len(schedules) > 1 or videos == 1, "the schedules of the videos differ"


def test_first_block_computing_every_step_is_bit_identical(model: STDiT3) -> None:
    values = inputs(1)
    always = run(model, adacache.AdaCache(codebook={9.0: 1}), values)[0]
    final, trace = run(model, adacache.FirstBlock(1e-12), values)
    assert torch.equal(final, always)
    assert trace.computed_steps == list(range(1, STEPS + 1))
    assert not any(flag for record in trace.measurements for flag in record["nonfinite"])


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.bfloat16, 0.02), (torch.float16, 0.003), (torch.float8_e4m3fn, 0.1)]
)
def test_first_block_keeps_residuals_in_other_dtypes(model: STDiT3, dtype: torch.dtype, bound: float) -> None:
    values = inputs(1)
    plain, full = run(model, adacache.FirstBlock(THRESHOLD), values)
    final, trace = run(model, adacache.FirstBlock(THRESHOLD, cache_dtype=dtype), values)
    assert 0 < relative_error(final, plain) < bound
    assert trace.cache_bytes < full.cache_bytes
    assert trace.policy["cache_dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("threshold", [0, -1.0, math.nan, math.inf, True, "0.1"])
def test_first_block_settings_are_checked(threshold: Any) -> None:
    with pytest.raises(ValueError, match="threshold: expected a number above 0, got"):
        adacache.FirstBlock(threshold)


# All policies.

POLICIES = [
    adacache.PAB(window=(100, 990)),
    adacache.TaylorSeer(),
    adacache.TaylorSeer(cache="block", order=2, interval=3),
    adacache.TaylorSeer(cache="output"),
    adacache.FirstBlock(THRESHOLD),
]
IDS = ["pab", "taylorseer_stack", "taylorseer_block", "taylorseer_output", "first_block"]


@pytest.mark.parametrize("policy", POLICIES, ids=IDS)
def test_requests_are_independent(model: STDiT3, policy: Any) -> None:
    values, other = inputs(1), inputs(2, seed=5)
    plain = denoise(model, values, STEPS)
    handle = adacache.enable(model, policy, num_steps=STEPS)
    with handle.request():
        expected = denoise(model, values, STEPS)
    assert not torch.equal(expected, plain)
    with handle.request(num_videos=2):
        denoise(model, other, STEPS)
    assert torch.equal(denoise(model, values, STEPS), expected), "outside a request"
    calls = 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt("interrupted")

    hook = model.temporal_blocks[0].mlp.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt), handle.request():
        denoise(model, inputs(1, seed=6), STEPS)
    hook.remove()
    with handle.request():
        assert torch.equal(denoise(model, values, STEPS), expected)
    adacache.disable(model)
    assert torch.equal(denoise(model, values, STEPS), plain)


@pytest.mark.parametrize("policy", POLICIES, ids=IDS)
def test_traces_are_saved_and_plotted(model: STDiT3, policy: Any, tmp_path: Any) -> None:
    trace = run(model, policy, inputs(1))[1]
    trace.save(tmp_path / "trace.json")
    assert adacache.Trace.load(tmp_path / "trace.json") == trace
    assert trace.policy == policy.describe()


@pytest.mark.parametrize("policy", POLICIES, ids=IDS)
def test_half_precision(policy: Any) -> None:
    model = golden_model().to(torch.bfloat16)
    values = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs(1).items()}
    plain = denoise(model, values, STEPS)
    final = run(model, policy, values)[0]
    assert final.dtype == plain.dtype
    assert 0 < relative_error(final.float(), plain.float()) < 0.5

# SPDX-License-Identifier: Apache-2.0
"""torch.compile of a whole model with AdaCache: one graph per kind of step, and the results of the model that
is not compiled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import adacache
import pytest
import torch
from adacache.digits import FPS, SIZE, encode, noise, sampler, with_null
from adacache.digits.captions import training_prompts
from model_cases import CODEBOOK, COGVIDEOX, HUNYUAN, LATTE, LTX, MOCHI, WAN_SIZE, WAN_VACE, Case
from model_cases import WAN as WAN_OF_FOUR
from test_model_runtime import schedule_of
from test_models import STEPS, enabled
from tiny_digits import network
from torch._dynamo.testing import CompileCounterWithBackend

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

WAN = replace(WAN_OF_FOUR, build=lambda: diffusers.WanTransformer3DModel(**{**WAN_SIZE, "num_layers": 2}))
POLICY = adacache.AdaCache(codebook=CODEBOOK)


@pytest.fixture(autouse=True)
def _fresh_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def graphs_of(case: Case, policy: Any, videos: int = 1) -> int:
    """Runs a model as it is and compiled, and compares; returns the number of graphs."""
    model, values = case.model(), case.values(videos)
    counter = CompileCounterWithBackend("eager")

    def run(called: Any) -> tuple[torch.Tensor, Any]:
        with handle.request(num_videos=videos):
            return case.denoise(called, values, STEPS), handle.trace.measurements

    with enabled(model, policy) as handle:
        expected, trace = run(model)
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        for called in (compiled, compiled, model):
            final, own = run(called)
            assert torch.equal(final, expected)
            assert own == trace
    return int(counter.frame_count)


@pytest.mark.slow
@pytest.mark.parametrize("case", [WAN, LATTE, COGVIDEOX, LTX, HUNYUAN, MOCHI], ids=lambda case: case.name)
def test_two_graphs(case: Case) -> None:
    assert graphs_of(case, POLICY) == 2


def test_a_fused_program() -> None:
    """The STDiT3 of this project, guidance in one batch, in its own sampler."""
    model, flow = network(), sampler(8)
    captions = with_null(model, encode(training_prompts()[:1]))
    handle = adacache.enable(model, adacache.AdaCache(codebook={0.05: 4, 0.2: 2, 9.0: 1}), num_steps=8)

    def run(called: Any) -> tuple[torch.Tensor, list[int]]:
        final = flow.sample(called, noise([0]), captions, fps=FPS, height=SIZE, width=SIZE)
        return final, handle.trace.computed_steps

    expected, steps = run(model)
    counter = CompileCounterWithBackend("eager")
    given = run(torch.compile(model, fullgraph=True, backend=counter))
    assert torch.equal(given[0], expected)
    assert given[1] == steps
    assert len(steps) < 8
    assert counter.frame_count == 2


@pytest.mark.parametrize(
    "first", [pytest.param("compile", marks=pytest.mark.slow), "adacache"], ids=lambda first: first
)
def test_in_either_order(first: str) -> None:
    model, values = WAN.model(), WAN.values()
    with enabled(model, POLICY):
        expected = WAN.denoise(model, values, STEPS)
    plain = WAN.denoise(model, values, STEPS)
    counter = CompileCounterWithBackend("eager")
    called = torch.compile(model, fullgraph=True, backend=counter) if first == "compile" else model
    with enabled(called, POLICY):
        if first == "adacache":
            called = torch.compile(model, fullgraph=True, backend=counter)
        assert torch.equal(WAN.denoise(called, values, STEPS), expected)
    assert counter.frame_count == 2
    assert torch.equal(WAN.denoise(called, values, STEPS), plain)


@pytest.mark.slow
def test_compiled_in_place() -> None:
    model, values = WAN.model(), WAN.values()
    with enabled(model, POLICY):
        expected = WAN.denoise(model, values, STEPS)
        model.compile(fullgraph=True, backend="eager")
        assert torch.equal(WAN.denoise(model, values, STEPS), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy",
    [
        adacache.TaylorSeer(interval=3, cache="stack"),
        adacache.AdaCache(codebook=CODEBOOK, metric_part="block"),
        adacache.AdaCache(codebook=CODEBOOK, cache_dtype=torch.float8_e4m3fn),
        adacache.AdaCache(codebook={9.0: 1}),
    ],
    ids=["forecast", "block metric", "float8", "every step"],
)
def test_policies(policy: Any) -> None:
    assert graphs_of(WAN, policy) <= 2


def test_videos_with_schedules_of_their_own() -> None:
    """All rows of a mixed step are computed, in one graph."""
    assert graphs_of(WAN, schedule_of(3), 3) == 3


@pytest.mark.slow
def test_videos_of_alternating_blocks() -> None:
    assert graphs_of(LATTE, schedule_of(3), 3) == 3


def test_another_length_of_the_prompt_computes() -> None:
    model, values = WAN.model(), WAN.values()
    longer = {**values, "encoder_hidden_states": torch.randn(1, 7, 12)}
    with enabled(model, adacache.Interval(interval=3)) as handle, torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        for step in range(STEPS):
            given = values if step < 4 else longer
            WAN.predict(compiled, given, values[WAN.latents], step, STEPS)
    assert handle.trace.computed_steps == [1, 4, 5, 7, 10]


@pytest.mark.slow
def test_guidance_in_two_calls() -> None:
    model, values, null = WAN.model(), WAN.values(seed=1), WAN.values(seed=2)
    with enabled(model, POLICY) as handle:
        expected = WAN.denoise_in_two_calls(model, values, null, STEPS, False)
        steps = handle.trace.computed_steps
        counter = CompileCounterWithBackend("eager")
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        given = WAN.denoise_in_two_calls(compiled, values, null, STEPS, False)
    assert torch.equal(given, expected)
    assert handle.trace.computed_steps == steps
    assert counter.frame_count == 2


@pytest.mark.parametrize(
    ("case", "policy"),
    [
        (WAN, adacache.PAB()),
        pytest.param(WAN, adacache.TeaCache(threshold=0.1), marks=pytest.mark.slow),
        pytest.param(WAN_VACE, POLICY, marks=pytest.mark.slow),
    ],
    ids=["outputs", "signal", "residual per block"],
)
def test_what_cannot_be_one_graph_says_so(case: Case, policy: Any) -> None:
    """With graph breaks it works."""
    model, values = case.model(), case.values()
    with enabled(model, policy) as handle:
        expected, steps = case.denoise(model, values, STEPS), handle.trace.computed_steps
        whole = torch.compile(model, backend="eager", fullgraph=True)
        with pytest.raises(Exception, match=r"AdaCache decides in Python .*compile_repeated_blocks"):
            case.denoise(whole, values, STEPS)
        torch._dynamo.reset()
        pieces = torch.compile(model, backend="eager")
        assert torch.equal(case.denoise(pieces, values, STEPS), expected)
        assert handle.trace.computed_steps == steps


@pytest.mark.slow
def test_a_failed_graph_leaves_nothing_behind() -> None:
    model, values = WAN.model(), WAN.values()
    with enabled(model, POLICY) as handle:
        expected = WAN.denoise(model, values, STEPS)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        broken = {**values, "encoder_hidden_states": torch.randn(1, 5, 11)}
        with pytest.raises(RuntimeError, match=r"mat1|shape|size"):
            WAN.denoise(compiled, broken, STEPS)
        assert torch.equal(WAN.denoise(model, values, STEPS), expected)
        assert torch.equal(WAN.denoise(compiled, values, STEPS), expected)
    assert handle.trace.computed_steps

# SPDX-License-Identifier: Apache-2.0
"""Loops of pipelines: several calls per step, several loops per call, other schedulers than that of the
pipeline."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import adacache
import pytest
import torch
from model_cases import WAN, Case
from test_calls import DUE, Calls, pattern, run_threads
from torch import Tensor

pytest.importorskip("diffusers", reason="diffusers is not installed")

STEPS = 12
P3 = adacache.AdaCache(codebook={99.0: 3})


class Pipeline:
    """A pipeline with a transformer, a scheduler and the given loop."""

    def __init__(self, loop: Callable[[Any], Tensor], case: Case = WAN):
        from diffusers import FlowMatchEulerDiscreteScheduler

        self.case = case
        self.transformer = case.model()
        self.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
        self.calls = Calls(case, self.transformer)
        self._loop = loop

    def __call__(self) -> Tensor:
        return self._loop(self)

    def predict(self, values: dict[str, Any], z: Tensor, t: Tensor) -> Tensor:
        return self.calls(values, z, STEPS - round(float(t) / 1000 * STEPS))


def values_of(*seeds: int, rows: int = 1) -> list[dict[str, Any]]:
    return [WAN.values(rows, seed=seed) for seed in seeds]


def run(loop: Callable[[Any], Tensor], policy: Any = P3) -> tuple[Pipeline, Any]:
    pipeline = Pipeline(loop)
    handle = adacache.enable(pipeline, policy)
    pipeline()
    return pipeline, handle


def step_through(pipeline: Any, z: Tensor, predict: Callable[[Tensor, Tensor], Tensor], steps: int) -> Tensor:
    pipeline.scheduler.set_timesteps(steps)
    for t in pipeline.scheduler.timesteps:
        z = pipeline.scheduler.step(predict(z, t), t, z).prev_sample
    return z


def test_calls_of_several_batch_sizes_per_step() -> None:
    """Like the default guidance of LTX-2: calls with two rows, one row, one row."""
    (pair,), (one, other) = values_of(1, rows=2), values_of(2, 3)

    def loop(pipeline: Any) -> Tensor:
        def predict(z: Tensor, t: Tensor) -> Tensor:
            a = pipeline.predict(pair, torch.cat((z, z)), t)[:1]
            b = pipeline.predict(one, z, t)
            return a + 0.1 * (b - pipeline.predict(other, z, t))

        return step_through(pipeline, one["hidden_states"], predict, STEPS)

    pipeline, handle = run(loop)
    assert pipeline.calls.pattern == pattern(STEPS, DUE, 3)
    assert handle.trace.computed_steps == DUE
    assert len(handle.trace.computed) == STEPS


def test_windows_under_one_name() -> None:
    """Each step calls the parts of a clip in sequence, all in `cache_context("cond")`."""
    windows = values_of(1, 2, 3)

    def loop(pipeline: Any) -> Tensor:
        def predict(z: Tensor, t: Tensor) -> Tensor:
            out = torch.zeros_like(z)
            for window in windows:
                with pipeline.transformer.cache_context("cond"):
                    out = out + pipeline.predict(window, z, t)
            return out / 3

        return step_through(pipeline, windows[0]["hidden_states"], predict, STEPS)

    pipeline, handle = run(loop)
    assert pipeline.calls.pattern == pattern(STEPS, DUE, 3)
    assert handle.trace.computed_steps == DUE


@pytest.mark.parametrize("stated", [None, 7])
@pytest.mark.parametrize("lengths", [(7, 7, 7), (7, 12), (12, 9)])
def test_several_loops_in_one_call(lengths: tuple[int, ...], stated: int | None) -> None:
    """Each loop that the scheduler starts is a separate request with the length of the loop."""
    (values,) = values_of(1)

    def loop(pipeline: Any) -> Tensor:
        z = values["hidden_states"]
        for i, steps in enumerate(lengths):
            if i == 0 and stated == steps:
                pipeline._num_timesteps = stated
            z = step_through(pipeline, z, lambda z, t: pipeline.predict(values, z, t), steps)
        return z

    pipeline, handle = run(loop)
    due = {7: "CCrrCCC", 9: "CCrrCrrCC", 12: "CCrrCrrCrrCC"}
    assert pipeline.calls.pattern == "".join(due[steps] for steps in lengths)
    assert handle.trace.num_steps == lengths[-1]


@pytest.mark.parametrize("announced", [True, False])
def test_a_shortened_loop(announced: bool) -> None:
    """Image-to-video with strength < 1 runs only the last timesteps."""
    (values,) = values_of(1)

    def loop(pipeline: Any) -> Tensor:
        z = values["hidden_states"]
        pipeline.scheduler.set_timesteps(16)
        timesteps = pipeline.scheduler.timesteps[4:]
        pipeline.scheduler.set_begin_index(4)
        if announced:
            pipeline._num_timesteps = len(timesteps)
        for t in timesteps:
            z = pipeline.scheduler.step(pipeline.predict(values, z, t), t, z).prev_sample
        return z

    pipeline, handle = run(loop)
    if announced:
        assert pipeline.calls.pattern == "CCrrCrrCrrCC"
        assert handle.trace.num_steps == 12
    else:  # the end of the loop is unknown
        assert pipeline.calls.pattern[:8] == "CCrrCrrC"


def test_guidance_ends_before_the_last_step() -> None:
    (pair,), (one,) = values_of(1, rows=2), values_of(2)

    def loop(pipeline: Any) -> Tensor:
        count = 0

        def predict(z: Tensor, t: Tensor) -> Tensor:
            nonlocal count
            count += 1
            if count <= 5:
                return pipeline.predict(pair, torch.cat((z, z)), t)[:1]
            return pipeline.predict(one, z, t)

        return step_through(pipeline, one["hidden_states"], predict, STEPS)

    pipeline, handle = run(loop)
    assert len(handle.trace.computed) == STEPS
    assert pipeline.calls.pattern == "CCrrCCrCrrCC"  # the first call with the new shape computes
    assert handle.trace.num_steps == STEPS


def test_a_scheduler_made_inside_the_call() -> None:
    """Its steps are not observed; timesteps are used instead, with a warning."""
    (values,) = values_of(1)
    sizes = []

    def loop(pipeline: Any) -> Tensor:
        pipeline._num_timesteps = STEPS
        scheduler = copy.deepcopy(type(pipeline.scheduler)(shift=1.0))
        scheduler.set_timesteps(STEPS)
        z = values["hidden_states"]
        for t in scheduler.timesteps:
            z = scheduler.step(pipeline.predict(values, z, t), t, z).prev_sample
        return z

    pipeline = Pipeline(loop)
    handle = adacache.enable(pipeline, P3)
    pipeline.scheduler.set_timesteps(STEPS)
    with pytest.warns(UserWarning, match="does not use its own scheduler"):
        pipeline()
    assert pipeline.calls.pattern == pattern(STEPS, DUE, 1)
    assert handle.trace.computed_steps == DUE
    sizes.append(handle.trace.cache_bytes)
    pipeline()
    assert handle.trace.cache_bytes == sizes[0]


@pytest.mark.parametrize("named", [True, False])
def test_videos_of_a_pipeline_without_prepare_latents(named: bool) -> None:
    """Modular pipelines: in a named guidance branch there is one row per video; otherwise it is unknown."""
    (pair,) = values_of(1, rows=2)

    def loop(pipeline: Any) -> Tensor:
        def predict(z: Tensor, t: Tensor) -> Tensor:
            if not named:
                return pipeline.predict(pair, z, t)
            with pipeline.transformer.cache_context("cond"):
                return pipeline.predict(pair, z, t)

        return step_through(pipeline, pair["hidden_states"], predict, STEPS)

    if named:
        _, handle = run(loop)
        assert handle.trace.num_videos == 2
    else:
        with pytest.warns(UserWarning, match="does not state how many videos its 2 rows are"):
            _, handle = run(loop)
        assert handle.trace.num_videos == 1


def test_pipelines_that_share_a_transformer() -> None:
    """Each has its own scheduler; they run in sequence and in threads."""
    runs = values_of(1, 2, 3, 4)

    def make(transformer: Any, values: dict[str, Any]) -> Any:
        def loop(pipeline: Any) -> Tensor:
            def predict(z: Tensor, t: Tensor) -> Tensor:
                with torch.no_grad():
                    step = STEPS - round(float(t) / 1000 * STEPS)
                    return WAN.predict(transformer, values, z, step, STEPS)

            return step_through(pipeline, values["hidden_states"], predict, STEPS)

        pipeline = Pipeline(loop)
        pipeline.transformer = transformer
        return pipeline

    transformer, policy = WAN.model(), adacache.AdaCache(codebook=WAN.codebook)
    pipelines = [make(transformer, values) for values in runs]
    plain = [pipeline() for pipeline in pipelines]
    handles = [adacache.enable(pipeline, policy) for pipeline in pipelines]
    alone = [pipeline() for pipeline in pipelines]
    schedules = [handle.trace.computed_steps for handle in handles]
    assert all(4 < len(steps) < STEPS for steps in schedules)

    def work(k: int) -> list[Tensor]:
        return [pipelines[k]() for _ in range(3)]

    for k, finals in enumerate(run_threads(4, work)):
        assert isinstance(finals, list), finals
        assert all(torch.equal(final, alone[k]) for final in finals)
        assert handles[k].trace.computed_steps == schedules[k]

    with pytest.raises(ValueError, match="enabled on it already"):
        adacache.enable(make(transformer, runs[0]), P3)
    for pipeline in pipelines[:3]:
        adacache.disable(pipeline)
    assert torch.equal(pipelines[3](), alone[3]), "must stay enabled until the last pipeline is disabled"
    adacache.disable(pipelines[3])
    assert all(torch.equal(pipeline(), out) for pipeline, out in zip(pipelines, plain, strict=True))

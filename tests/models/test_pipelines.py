# SPDX-License-Identifier: Apache-2.0
"""Pipelines with small random components, enabled with one call."""

from __future__ import annotations

from typing import Any

import adacache
import pytest
import torch
from model_cases import CODEBOOK, relative_error
from pipeline_cases import PIPELINES, PipelineCase

pytest.importorskip("diffusers", reason="diffusers is not installed")

every_pipeline = pytest.mark.parametrize("case", PIPELINES, ids=str)
CASE = {str(case): case for case in PIPELINES}
POLICY = adacache.AdaCache(codebook=CODEBOOK)


@every_pipeline
def test_end_to_end(case: PipelineCase) -> None:
    pipeline = case.build()
    plain = case.generate(pipeline)
    kind, transformer = type(pipeline), type(pipeline.transformer)

    handle = adacache.enable(pipeline, adacache.AdaCache(codebook={99.0: 1}))
    assert torch.equal(case.generate(pipeline), plain), "all steps computed: bit-identical"
    assert handle.trace.computed_steps == list(range(1, 13)), "steps of the scheduler"
    assert handle.trace.num_steps == 12
    adacache.disable(pipeline)

    handle = adacache.enable(pipeline, POLICY)
    final = case.generate(pipeline)
    trace = handle.trace
    assert 4 < len(trace.computed_steps) < 12
    assert 0 < relative_error(final, plain) < 1
    assert torch.equal(case.generate(pipeline, seed=7), case.generate(pipeline, seed=7))
    assert torch.equal(case.generate(pipeline), final), "state of an earlier call"
    assert handle.trace.computed == trace.computed
    assert not any(request.caches for h in handle.handles.values() for request in [h._latest])

    adacache.disable(pipeline)
    assert (type(pipeline), type(pipeline.transformer)) == (kind, transformer)
    assert not any("adacache" in name for name in (*vars(pipeline), *vars(pipeline.transformer)))
    assert torch.equal(case.generate(pipeline), plain)


@pytest.mark.parametrize("name", ["LattePipeline", "CogVideoXPipeline", "WanPipeline", "LTXPipeline"])
def test_per_video_decisions_in_one_call(name: str) -> None:
    """The number of videos is inferred from the latents, with guidance in one batch and in two calls."""
    case = CASE[name]
    pipeline = case.build()
    handle = adacache.enable(pipeline, adacache.AdaCache(codebook={0.3: 5, 0.6: 4, 0.9: 3, 1.2: 2, 1.5: 1}))
    together = case.generate(pipeline, prompts=2, seed=3)
    trace = handle.trace
    assert trace.num_videos == 2
    assert len(trace.computed_steps) < 12
    calls = case.call(2)
    for video in range(2):
        alone = {
            key: value[video : video + 1] if isinstance(value, torch.Tensor) else value
            for key, value in calls.items()
        }
        single = PipelineCase(case.name, case.parts, lambda _: alone)  # noqa: B023
        result = single.generate(pipeline, seed=3 + video)
        assert handle.trace.computed_steps == trace.steps_of(video)
        assert relative_error(result[0], together[video]) < 1e-4


def test_two_transformers_share_the_schedule() -> None:
    """Wan 2.2: each transformer has its part of the steps and its own caches; its first and last steps
    compute."""
    case = CASE["WanPipeline_two_transformers"]
    pipeline = case.build()
    handle = adacache.enable(pipeline, adacache.AdaCache(codebook={99.0: 9}))
    case.generate(pipeline, num_steps=24)
    first, second = handle.traces["transformer"], handle.traces["transformer_2"]
    assert (len(first.computed), len(second.computed)) == (first.num_steps, second.num_steps)
    assert first.num_steps + second.num_steps == 24
    for trace in (first, second):
        n = trace.num_steps
        assert trace.computed_steps[:2] == [1, 2]
        assert trace.computed_steps[-2:] == [n - 1, n]
    assert handle.trace.computed_steps == [
        *first.computed_steps,
        *(step + first.num_steps for step in second.computed_steps),
    ]
    assert handle.sites[0].startswith("transformer.blocks.0")


def test_a_long_video_in_parts() -> None:
    """SkyReels diffusion forcing runs several loops per call and copies its scheduler."""
    case = CASE["SkyReelsV2DiffusionForcingPipeline"]
    pipeline = case.build()
    plain = case.generate(pipeline)
    handle = adacache.enable(pipeline, adacache.AdaCache(codebook={99.0: 3}))
    final = case.generate(pipeline)
    assert handle.trace.computed_steps == [1, 2, 5, 8, 11, 12]
    assert 0 < relative_error(final, plain) < 0.5


def test_interrupted_call_leaves_no_state() -> None:
    case = CASE["WanPipeline"]
    pipeline = case.build()
    handle = adacache.enable(pipeline, POLICY)
    expected = case.generate(pipeline)
    scheduler = type(pipeline.scheduler)

    def stop(_pipeline: Any, step: int, _timestep: Any, values: Any) -> Any:
        if step == 5:
            raise KeyboardInterrupt("interrupted")
        return values

    with pytest.raises(KeyboardInterrupt):
        case.generate(pipeline, seed=9, callback_on_step_end=stop)
    assert len(handle.trace.computed) == 6
    assert type(pipeline.scheduler) is scheduler
    assert torch.equal(case.generate(pipeline), expected)


def test_number_of_steps() -> None:
    case = CASE["WanPipeline"]
    pipeline = case.build()
    adacache.enable(pipeline, "open-sora/fast", num_steps=30)
    with pytest.raises(ValueError, match="enabled for 30 steps, the pipeline runs 12"):
        case.generate(pipeline)
    adacache.disable(pipeline)
    handle = adacache.enable(pipeline, "open-sora/fast")
    case.generate(pipeline, num_steps=30)
    assert handle.trace.num_steps == 30
    with pytest.raises(ValueError, match="open-sora/fast has codebooks for"):
        case.generate(pipeline)
    adacache.disable(pipeline)
    with pytest.raises(ValueError, match="policy: expected one of"):
        adacache.enable(pipeline, "no such preset")
    assert type(pipeline).__dict__.get("_adacache_base") is None
    handle = adacache.enable(pipeline, POLICY)
    with pytest.raises(ValueError, match="enabled on it already"):
        adacache.enable(pipeline, POLICY)
    with pytest.warns(UserWarning, match="of 6 steps, .* caching saves little"):
        case.generate(pipeline, num_steps=6)
    adacache.disable(pipeline)
    with pytest.raises(ValueError, match="not enabled"):
        adacache.disable(pipeline)


def test_steps_without_guidance() -> None:
    """A branch that skipped a computed step is computed at its next call; it does not reuse older
    residuals."""
    case = CASE["WanPipeline"]
    pipeline = case.build()
    handle = adacache.enable(pipeline, adacache.AdaCache(codebook={99.0: 3}))

    def guidance(pipe: Any, step: int, _timestep: Any, values: Any) -> Any:
        pipe._guidance_scale = 1.0 if 3 <= step < 6 else 5.0
        return values

    final = case.generate(pipeline, callback_on_step_end=guidance)
    assert torch.isfinite(final).all()
    # Steps 5 to 7 ran without guidance, and step 5 was computed: at step 8 both branches are due.
    assert handle.trace.computed_steps == [1, 2, 5, 8, 11, 12]

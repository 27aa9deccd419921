# SPDX-License-Identifier: Apache-2.0
"""The runtime on every model class: rows of mixed steps, dtypes of kept residuals, storage, sub-layer
outputs."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import adacache
import pytest
import torch
from adacache.adapters.registry import spec_for
from model_cases import CASES, TWINS, WAN, WAN_SIZE, Case, CountOps, relative_error
from test_models import STEPS, enabled
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

CHECKED = [*CASES, *TWINS]
"""The cases of tests with a `case` argument, see conftest.py."""
SCHEDULES = [[1, 4, 8, 12], [1, 2, 7, 12], [1, 3, 4, 5]]
"""Computed steps of three videos, with all kinds of mixed steps: one video, two, non-adjacent ones."""


def schedule_of(videos: int) -> adacache.Replay:
    """Replays a different schedule for each video."""
    computed = [[step in SCHEDULES[video] for video in range(videos)] for step in range(1, STEPS + 1)]
    return adacache.Replay(adacache.Trace(STEPS, videos, {}, computed))


def with_storage(policy: adacache.Replay, cache: str, dtype: torch.dtype | None = None) -> adacache.Replay:
    policy.cache, policy.cache_dtype = cache, dtype
    return policy


@pytest.mark.parametrize("blocks", [4, 8])
def test_mixed_steps_gather_once_and_scatter_once(blocks: int) -> None:
    case = replace(WAN, build=lambda: diffusers.WanTransformer3DModel(**{**WAN_SIZE, "num_layers": blocks}))
    model, values = case.model(), case.values(3)
    tokens = (3, 3 * 2 * 2, 24)
    gathered: list[int] = []
    scattered = []
    with enabled(model, schedule_of(3)) as handle, handle.request(num_videos=3):
        for step in range(STEPS):
            with CountOps(tokens) as count, torch.no_grad():
                case.predict(model, values, values[case.latents], step, STEPS)
            computing = sum(step + 1 in steps for steps in SCHEDULES)
            if computing == 2:
                gathered.append(count.ops["aten::index_select"] + count.ops["aten::slice"])
            if 0 < computing < 3:
                assert count.ops["adacache::reuse_residual"] == 1
                assert sum(count.ops[f"aten::{name}"] for name in ("index_copy_", "index_put_", "copy_")) == 0
                scattered.append(step)
    assert len(scattered) > 3
    assert gathered
    assert set(gathered) == {1}


def kept_streams(case: Case, model: nn.Module, values: dict[str, Any]) -> list[Tensor]:
    """The streams that a step keeps: the outputs of the last block, or of all blocks if a residual per block
    is kept."""
    found: list[list[Tensor]] = []

    def note(_: nn.Module, args: Any, output: Any) -> None:
        outputs = [output] if isinstance(output, Tensor) else list(output)
        found.append([x for x in outputs if isinstance(x, Tensor)])

    hooks = [block.register_forward_hook(note) for _, block in case.blocks(model)]
    with torch.no_grad():
        case.predict(model, values, values[case.latents], 0, STEPS)
    for hook in hooks:
        hook.remove()
    kept = found if case.works_between else found[-1:]
    return [x for streams in kept for x in streams]


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.bfloat16, 0.02), (torch.float16, 0.003), (torch.float8_e4m3fn, 0.1)]
)
@pytest.mark.sampled(3)
def test_kept_residuals_of_other_dtypes(case: Case, dtype: torch.dtype, bound: float) -> None:
    """Whole and mixed steps equal float32 within the rounding of the kept dtype; cache_bytes is as
    expected."""
    videos = 1 if case.one_video else 3
    model, values = case.model(), case.values(videos, seed=1)
    streams = kept_streams(case, model, values)
    with enabled(model, schedule_of(videos)) as handle:
        exact = case.denoise(model, values, STEPS)
    assert handle.trace.cache_bytes == 4 * sum(x.numel() for x in streams)
    with enabled(model, with_storage(schedule_of(videos), "stack", dtype)) as handle:
        final = case.denoise(model, values, STEPS)
    assert [handle.trace.steps_of(video) for video in range(videos)] == SCHEDULES[:videos]
    scales = 4 if dtype == torch.float8_e4m3fn else 0
    assert handle.trace.cache_bytes == sum(
        x.numel() * dtype.itemsize + scales * (x.numel() // x.shape[-1]) for x in streams
    )
    for video in range(videos):
        assert 0 < relative_error(final[video], exact[video]) < bound


@pytest.mark.sampled(3)
def test_per_video_decisions_with_float8(case: Case) -> None:
    if case.one_video:
        pytest.skip("the model supports one video per call")
    model, batch = case.model(), case.values(2, seed=1)
    scale = torch.tensor([1.0, 4.0]).view(2, *[1] * (batch[case.latents].ndim - 1))
    batch[case.latents] = batch[case.latents] * scale
    policy = adacache.AdaCache(codebook=case.codebook, cache_dtype=torch.float8_e4m3fn)
    with enabled(model, policy) as handle:
        together = case.denoise(model, batch, STEPS)
    trace = handle.trace
    assert trace.policy["cache_dtype"] == "float8_e4m3fn"
    for video in range(2):
        with enabled(model, policy) as handle:
            alone = case.denoise(model, case.rows(batch, video), STEPS)
        assert trace.steps_of(video) == handle.trace.computed_steps
        assert [record["step"] for record in trace.measurements if record["distance"][video] is not None] == [
            record["step"] for record in handle.trace.measurements
        ]
        # Rounding to float8 amplifies differences from the order of summation.
        assert relative_error(together[video], alone[0]) < 0.02


@pytest.mark.sampled(3)
def test_residuals_by_block_and_of_the_stack_agree(case: Case) -> None:
    videos = 1 if case.one_video else 3
    model, values = case.model(), case.values(videos, seed=2)
    finals, sizes = [], []
    for cache in ("stack", "block"):
        with enabled(model, with_storage(schedule_of(videos), cache)) as handle:
            finals.append(case.denoise(model, values, STEPS))
            sizes.append(handle.trace.cache_bytes)
    assert relative_error(finals[0], finals[1]) < case.tolerance
    assert sizes[0] == sizes[1] if case.works_between else sizes[0] < sizes[1]


@pytest.mark.sampled(3)
def test_declared_outputs_are_of_children_that_run(case: Case) -> None:
    """Every declared sub-layer, computed in every step and reused."""
    model, values = case.model(), case.values(1 if case.one_video else 2)
    spec, known = spec_for(model)
    assert known
    places = spec.places(model)
    parts = spec.sites(model).output_parts
    if not parts:
        with pytest.raises(ValueError, match=r"ranges: expected some of the model's sub-layers \[\]"):
            adacache.enable(model, adacache.PAB(), num_steps=STEPS)
        return
    plain = case.denoise(model, values, STEPS)
    calls: Counter[str] = Counter()

    def count(name: str) -> Any:
        def hook(*_: Any) -> None:
            calls[name] += 1

        return hook

    for place in places:
        for part, child in place.list.outputs.items():
            name = f"{place.position}.{part}"
            place.module.get_submodule(child).register_forward_pre_hook(count(name))
    names = {f"{place.position}.{part}" for place in places for part in place.list.outputs}
    with enabled(model, adacache.PAB(dict.fromkeys(parts, 1), window=(0, 2000))):
        assert torch.equal(case.denoise(model, values, STEPS), plain)
    assert calls == dict.fromkeys(names, STEPS)
    for part in parts:
        calls.clear()
        with enabled(model, adacache.PAB({part: 4}, window=(0, 2000))):
            final = case.denoise(model, values, STEPS)
        for name in names:
            own = name.endswith(f".{part}")
            assert calls[name] == (math.ceil(STEPS / 4) if own else STEPS), name
        assert relative_error(final, plain) > 1e-6, f"reuse of {part} has no effect"

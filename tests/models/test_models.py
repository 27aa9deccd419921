# SPDX-License-Identifier: Apache-2.0
"""Checks of every model class: results are bit-identical if all steps are computed, and equal the reference
implementation of the rule otherwise."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import adacache
import pytest
import torch
from adacache.adapters.generic import generic_spec
from model_cases import CASES, LATTE_OF_ONE_LIST, TWINS, Case, CountOps, denoise_slowly, fit, relative_error
from torch import Tensor

pytest.importorskip("diffusers", reason="diffusers is not installed")

STEPS = 12
BLOCK = 1
"""The middle block of four."""

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


CHECKED = [*CASES, *TWINS]
"""The cases of the tests, see conftest.py."""


@contextlib.contextmanager
def enabled(model: Any, policy: Any, steps: int = STEPS, **options: Any) -> Iterator[adacache.Handle]:
    handle = adacache.enable(model, policy, num_steps=steps, **{"rows_per_video": 1, **options})
    try:
        yield handle
    finally:
        adacache.disable(model)


def test_computing_always_changes_no_bit(case: Case) -> None:
    model, values = case.model(), case.values(1 if case.one_video else 2)
    before = {name: type(module) for name, module in model.named_modules()}
    plain = case.denoise(model, values, 9)
    for part in (None, "block"):
        with enabled(model, adacache.AdaCache(codebook={9.0: 1}, metric_part=part), 9) as handle:
            assert torch.equal(case.denoise(model, values, 9), plain)
            assert handle.trace.computed_steps == list(range(1, 10))
            expected = case.part if part is None else "block"
            assert any(record["site"].endswith(f".{expected}") for record in handle.trace.measurements)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert not any("adacache" in name for module in model.modules() for name in module.__dict__)
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(case.denoise(model, values, 9), plain)


@pytest.mark.parametrize("cache", ["stack", "block"])
@pytest.mark.sampled(2)
def test_schedule_is_that_of_the_rule_written_out(case: Case, cache: str) -> None:
    model, values = case.model(), case.values()
    expected, computed, distances = denoise_slowly(case, model, values, STEPS, case.codebook, BLOCK)
    assert 4 < len(computed) < STEPS, "trivial schedule"
    assert relative_error(case.denoise(model, values, STEPS), expected) > 1e-3, "reuse has no effect"
    with enabled(model, adacache.AdaCache(codebook=case.codebook, cache=cache)) as handle:
        final = case.denoise(model, values, STEPS)
    trace = handle.trace
    assert trace.computed_steps == computed
    ((_, measured),) = trace.series("distance").items()
    assert [step for step, _ in measured] == [step for step, _, _ in distances]
    assert [value for _, value in measured] == pytest.approx([value for _, value, _ in distances], rel=1e-4)
    if case.motion:
        ((_, moved),) = trace.series("motion").items()
        assert [dict(moved)[step] for step, _, _ in distances] == pytest.approx(
            [motion for _, _, motion in distances], rel=1e-4
        )
    assert relative_error(final, expected) < 1e-5


@pytest.mark.sampled(2)
def test_videos_of_a_batch_decide_for_themselves(case: Case) -> None:
    """Three videos with different schedules have the results of separate runs."""
    if case.one_video:
        pytest.skip("the model supports one video per call")
    model, batch = case.model(), case.values(3, seed=1)
    scale = torch.tensor([1.0, 4.0, 0.25]).view(3, *[1] * (batch[case.latents].ndim - 1))
    batch[case.latents] = batch[case.latents] * scale
    policy = adacache.AdaCache(codebook=case.codebook)
    singles, schedules = [], []
    for video in range(3):
        with enabled(model, policy) as handle:
            singles.append(case.denoise(model, case.rows(batch, video), STEPS))
        schedules.append(handle.trace.computed_steps)
    assert len({tuple(steps) for steps in schedules}) > 1, "all videos have the same schedule"
    for cache in ("stack", "block"):
        with enabled(model, replace(policy, cache=cache)) as handle:
            together = case.denoise(model, batch, STEPS)
        assert [handle.trace.steps_of(video) for video in range(3)] == schedules
        for video in range(3):
            assert relative_error(together[video], singles[video][0]) < case.tolerance


@pytest.mark.sampled(2)
def test_guidance_in_two_calls(case: Case) -> None:
    """The first branch decides for both; each reuses its own residuals."""
    model, values, null = case.model(), case.values(seed=1), case.values(seed=2)
    finals = []
    for context in (False, True) if hasattr(model, "cache_context") else (False,):
        with enabled(model, adacache.AdaCache(codebook=case.codebook)) as handle:
            finals.append(case.denoise_in_two_calls(model, values, null, STEPS, context))
        trace = handle.trace
        assert len(trace.computed) == STEPS > len(trace.computed_steps)
    assert all(torch.equal(final, finals[0]) for final in finals)
    if case.one_video:
        return
    # The same in one batch with the recorded schedule: branches did not mix residuals.
    both = {
        name: torch.cat((value, null[name]))
        if isinstance(value, torch.Tensor) and name not in case.shared and value.shape[:1] == (1,)
        else value
        for name, value in values.items()
    }
    z = values[case.latents]
    with torch.no_grad(), enabled(model, adacache.Replay(trace), rows_per_video=2):
        for step in range(STEPS):
            conditional, unconditional = case.predict(model, both, torch.cat((z, z)), step, STEPS).chunk(2)
            z = z - (unconditional + 2.0 * (conditional - unconditional)) / STEPS
    assert relative_error(finals[0], z) < case.tolerance


@pytest.mark.sampled(2)
def test_an_exception_leaves_nothing_behind(case: Case) -> None:
    model, values = case.model(), case.values(seed=3)
    other = {**values, case.latents: values[case.latents] * 3}
    with enabled(model, adacache.AdaCache(codebook=case.codebook)):
        expected = case.denoise(model, values, STEPS)
        case.denoise(model, other, STEPS)
        assert torch.equal(case.denoise(model, values, STEPS), expected), "state of an earlier call"
        block = case.blocks(model)[-1][1]

        def fail(*_: Any) -> None:
            raise KeyboardInterrupt("interrupted")

        hook = block.register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            case.denoise(model, other, STEPS)
        hook.remove()
        assert torch.equal(case.denoise(model, values, STEPS), expected)
        # Another shape, then the first shape again.
        if not case.fixed_frames:
            case.denoise(model, case.values(frames=2), STEPS)
        assert torch.equal(case.denoise(model, values, STEPS), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
@pytest.mark.sampled(2)
def test_half_precision(case: Case, dtype: torch.dtype) -> None:
    model = case.model().to(dtype)
    values = {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in case.values().items()
    }
    with torch.autocast("cpu", dtype) if case.keeps_float32 else contextlib.nullcontext():
        plain = case.denoise(model, values, 9)
        with enabled(model, adacache.AdaCache(codebook={99.0: 1}), 9):
            assert torch.equal(case.denoise(model, values, 9), plain)
        with enabled(model, adacache.AdaCache(codebook={99.0: 3}), 9) as handle:
            final = case.denoise(model, values, 9)
    assert handle.trace.computed_steps == [1, 2, 5, 8, 9]
    assert torch.isfinite(final).all()
    assert relative_error(final, plain) < 1.0


@pytest.mark.sampled(2)
def test_autocast(case: Case) -> None:
    model, values = case.model(), case.values()
    with torch.autocast("cpu", torch.bfloat16):
        plain = case.denoise(model, values, 9)
        with enabled(model, adacache.AdaCache(codebook={99.0: 1}), 9):
            assert torch.equal(case.denoise(model, values, 9), plain)
        with enabled(model, adacache.AdaCache(codebook={99.0: 3}), 9) as handle:
            final = case.denoise(model, values, 9)
    assert handle.trace.computed_steps == [1, 2, 5, 8, 9]
    assert torch.isfinite(final).all()


@pytest.mark.sampled(2)
def test_found_by_structure_gives_the_same(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an adapter, blocks are detected by structure, and reuse gives the same result."""
    if case.works_between:
        pytest.skip("modules between the blocks would be detected as blocks")
    model, values = case.model(), case.values()
    schedule = adacache.Replay([1, 2, 5, 9, 11, 12])
    with enabled(model, schedule) as handle:
        assert handle.known
        expected = case.denoise(model, values, STEPS)
    monkeypatch.setattr("adacache.handle.spec_for", lambda model, blocks=True: (generic_spec(model), False))
    with enabled(model, schedule) as handle:
        assert not handle.known
        assert relative_error(case.denoise(model, values, STEPS), expected) < case.tolerance
        assert relative_error(case.denoise(model, values, STEPS), expected) < case.tolerance
    plain = case.denoise(model, values, 9)
    with enabled(model, adacache.AdaCache(codebook={9.0: 1}), 9) as handle:
        assert torch.equal(case.denoise(model, values, 9), plain)
    assert {record["site"].rsplit(".")[-1] for record in handle.trace.measurements} == {"block"}


@pytest.mark.sampled(2)
def test_a_reused_step_runs_no_block(case: Case) -> None:
    """One reuse_residual per stream, no attention, and no additional synchronization."""
    model, values = case.model(), case.values()
    z = values[case.latents]

    def count(step: int) -> Counter[str]:
        with CountOps() as found, torch.no_grad():
            case.predict(model, values, z, step, STEPS)
        return found.ops

    def attention(ops: Counter[str]) -> int:
        return sum(calls for name, calls in ops.items() if "scaled_dot_product" in name)

    plain = count(0)
    policy = adacache.Replay([1, 11, 12])
    with enabled(model, policy) as handle, handle.request():
        computed, reused = count(0), count(1)
    blocks = len(case.blocks(model))
    for found in (computed, reused):
        assert found["aten::_local_scalar_dense"] <= plain["aten::_local_scalar_dense"]
    added = (case.returned or len(case.streams)) * (blocks if case.works_between else 1)
    assert reused["adacache::reuse_residual"] == added
    assert attention(computed) == attention(plain)
    if attention(plain):
        assert attention(plain) - attention(reused) >= blocks


def calls_past_the_model(case: Case) -> None:
    """Samplers of Latte without text call `forward_with_cfg` or `forward` instead of the model."""
    model, values = case.model(), case.values()
    t = torch.linspace(1000.0, 100.0, STEPS)
    y = torch.cat((values["y"], values["y"] + 1))

    def loop(call: Any) -> Tensor:
        z = torch.cat((values["x"], values["x"]))
        with torch.no_grad():
            for step in range(STEPS):
                z = z - fit(call(z, t[step].expand(2), y=y), z) / STEPS
        return z

    def guided(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        output = model(x, t, y=y)
        conditional, unconditional = fit(output, x).chunk(2)
        return (unconditional + 7.0 * (conditional - unconditional)).repeat(2, 1, 1, 1, 1)

    policy = adacache.AdaCache(codebook=case.codebook)
    for by_name, called in (("forward", model), ("forward_with_cfg", guided)):
        plain = loop(getattr(model, by_name))
        with enabled(model, policy, rows_per_video=2) as handle:
            expected, steps = loop(called), handle.trace.computed_steps
            handle.reset()
            assert torch.equal(loop(getattr(model, by_name)), expected)
            assert handle.trace.computed_steps == steps != list(range(1, STEPS + 1))
        assert torch.equal(loop(getattr(model, by_name)), plain)


def test_calls_past_the_model() -> None:
    calls_past_the_model(LATTE_OF_ONE_LIST)


CHECKS = {
    name: check
    for name, check in globals().items()
    if name.startswith("test_") and "case" in check.__annotations__
}
"""The tests with a `case` argument, for modules that run them on other cases."""

# SPDX-License-Identifier: Apache-2.0
"""AdaCache on STDiT3: against a reference implementation of the rule, per video, and across requests."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import adacache
import pytest
import torch
from adacache.models.rectified_flow import RectifiedFlow
from adacache.models.stdit3 import STDiT3
from models import CODEBOOK, close, denoise, denoise_slowly, inputs, relative_error, rows_of

STEPS = 30
POLICY = adacache.AdaCache(codebook=CODEBOOK)


@pytest.mark.parametrize("cache", ["stack", "sublayer"])
@pytest.mark.parametrize("block", [0, 2])
def test_schedule_is_that_of_the_rule_written_out(model: STDiT3, cache: str, block: int) -> None:
    values = inputs(1, seed=3)
    expected, computed, distances = denoise_slowly(model, values, STEPS, CODEBOOK, block)
    assert 4 < len(computed) < 25
    handle = adacache.enable(model, replace(POLICY, metric_blocks=[block], cache=cache), num_steps=STEPS)
    final = denoise(model, values, STEPS)
    assert handle.trace.computed_steps == computed
    measured = handle.trace.series("distance")[f"temporal_blocks.{block}.temporal_attention"]
    assert [step for step, _ in measured] == [step for step, _ in distances]
    assert all(close(a, b, 1e-4) for (_, a), (_, b) in zip(measured, distances, strict=True))
    assert relative_error(final, expected) < 1e-5


def test_computing_every_step_and_disable_are_bit_identical(model: STDiT3) -> None:
    values = inputs(1)
    plain = denoise(model, values, 4)
    handle = adacache.enable(model, adacache.AdaCache(codebook={9.0: 1}), num_steps=4)
    assert torch.equal(denoise(model, values, 4), plain)
    assert handle.trace.computed_steps == [1, 2, 3, 4]
    adacache.disable(model)
    assert not any("adacache" in name or name == "forward" for name in model.__dict__)
    assert torch.equal(denoise(model, values, 4), plain)


def test_instance_forward_is_called_and_restored(model: STDiT3) -> None:
    """Offloading libraries replace `forward` on the instance."""
    values, calls = inputs(1), []
    handle = adacache.enable(model, POLICY, num_steps=STEPS)
    expected = denoise(model, values, STEPS)
    steps = handle.trace.computed_steps
    adacache.disable(model)

    def own(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return type(model).forward(model, *args, **kwargs)

    model.__dict__["forward"] = own
    handle = adacache.enable(model, POLICY, num_steps=STEPS)
    assert torch.equal(denoise(model, values, STEPS), expected)
    assert handle.trace.computed_steps == steps
    assert len(calls) == STEPS
    adacache.disable(model)
    assert model.__dict__.pop("forward") is own


@pytest.mark.parametrize(
    "part", ["temporal_attention", "spatial_attention", "cross_attention", "mlp", "cross_attention_mlp"]
)
@pytest.mark.parametrize("cache", ["stack", "sublayer"])
def test_computing_every_step_is_bit_identical_for_each_part(model: STDiT3, part: str, cache: str) -> None:
    values = inputs(1)
    plain = denoise(model, values, 3)
    policy = adacache.AdaCache(codebook={9.0: 1}, metric_part=part, cache=cache)
    handle = adacache.enable(model, policy, num_steps=3)
    assert torch.equal(denoise(model, values, 3), plain)
    assert len(handle.trace.measurements) == (
        4 if part in ("cross_attention", "mlp", "cross_attention_mlp") else 2
    )


def test_a_reused_step_runs_no_block(model: STDiT3) -> None:
    """The profile shows one residual add, no attention, and no synchronization beyond the plain model's."""
    values = inputs(1)

    def names(steps: int) -> list[str]:
        with torch.profiler.profile() as profile:
            denoise(model, values, steps)
        return [event.name for event in profile.events()]

    plain = names(9)
    handle = adacache.enable(model, adacache.Replay([1, 8, 9]), num_steps=9)
    with handle.request():
        cached = names(9)
    for name in ("adacache::temporal_attention", "aten::scaled_dot_product_attention"):
        assert plain.count(name) == 3 * cached.count(name) > 0
    assert cached.count("adacache::reuse_residual_out") == 6
    assert cached.count("aten::_local_scalar_dense") <= plain.count("aten::_local_scalar_dense")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(model: STDiT3, dtype: torch.dtype) -> None:
    half = STDiT3(model.config).to(dtype).eval()
    half.load_state_dict(model.state_dict())
    values = inputs(1)
    plain = denoise(half, values, 9)
    handle = adacache.enable(half, adacache.AdaCache(codebook={9.0: 1}), num_steps=9)
    assert torch.equal(denoise(half, values, 9), plain)
    adacache.disable(half)
    handle = adacache.enable(half, adacache.AdaCache(codebook={9.0: 3}), num_steps=9)
    assert 0 < relative_error(denoise(half, values, 9), plain) < 0.5
    assert handle.trace.computed_steps == [1, 2, 5, 8, 9]


def test_videos_of_a_batch_decide_for_themselves(model: STDiT3) -> None:
    batch = inputs(3, seed=1)
    batch["z"][1] *= 3.0
    batch["y"][[0, 3]] *= 2.5
    singles, schedules = [], []
    for video in range(3):
        handle = adacache.enable(model, POLICY, num_steps=STEPS)
        with handle.request(num_videos=1):
            singles.append(denoise(model, rows_of(batch, video), STEPS))
        schedules.append(handle.trace.computed_steps)
        adacache.disable(model)
    assert len({tuple(steps) for steps in schedules}) == 3, "the schedules of the videos differ"

    for cache in ("stack", "sublayer"):
        handle = adacache.enable(model, replace(POLICY, cache=cache), num_steps=STEPS)
        with handle.request(num_videos=3):
            together = denoise(model, batch, STEPS)
        assert [handle.trace.steps_of(video) for video in range(3)] == schedules
        for video in range(3):
            assert relative_error(together[video], singles[video][0]) < 1e-4
        adacache.disable(model)


def test_one_decision_per_batch(model: STDiT3) -> None:
    batch = inputs(2, seed=1)
    handle = adacache.enable(model, replace(POLICY, per_video=False), num_steps=STEPS)
    with handle.request(num_videos=2):
        denoise(model, batch, STEPS)
    assert handle.trace.num_videos == 1


def test_rows_in_any_order(model: STDiT3) -> None:
    """Interleaved rows with `video_of_row` give the same schedules."""
    batch = inputs(2, seed=1)
    batch["z"][1] *= 3.0
    batch["y"][[0, 2]] *= 2.5
    handle = adacache.enable(model, POLICY, num_steps=STEPS)
    with handle.request(num_videos=2):
        denoise(model, batch, STEPS)
    expected = [handle.trace.steps_of(video) for video in range(2)]
    assert expected[0] != expected[1]

    z = batch["z"]
    with torch.no_grad(), handle.request(num_videos=2, video_of_row=[0, 0, 1, 1]):
        for i in range(STEPS):
            x = z.repeat_interleave(2, dim=0)
            y = batch["y"][[0, 2, 1, 3]]
            t = torch.full((4,), (1 - i / STEPS) * 1000)
            out = model(x, t, y, batch["mask"][[0, 0, 1, 1]], fps=24.0, height=64, width=96)[:, :4]
            z = z + (out[1::2] + 4.0 * (out[::2] - out[1::2])) / STEPS
    assert [handle.trace.steps_of(video) for video in range(2)] == expected


def guided_in_two_calls(model: Any, values: dict[str, torch.Tensor], steps: int) -> torch.Tensor:
    z = values["z"]
    with torch.no_grad():
        for i in range(steps):
            t = torch.full((1,), (1 - i / steps) * 1000)
            conditional, unconditional = (
                model(z, t, values["y"][row : row + 1], values["mask"], fps=24.0, height=64, width=96)[:, :4]
                for row in (0, 1)
            )
            z = z + (unconditional + 4.0 * (conditional - unconditional)) / steps
    return z


@pytest.mark.parametrize("explicit", [True, False])
def test_guidance_in_two_calls(model: STDiT3, explicit: bool) -> None:
    """Both guidance branches use the decision of the first branch, and each reuses its own residuals."""
    values = inputs(1, seed=2)
    handle = adacache.enable(model, POLICY, num_steps=STEPS)
    if explicit:
        with handle.request(branches=2):
            final = guided_in_two_calls(model, values, STEPS)
    else:
        final = guided_in_two_calls(model, values, STEPS)
    trace = handle.trace
    assert len(trace.computed) == STEPS
    assert len(trace.computed_steps) < STEPS
    adacache.disable(model)

    # One batch with the same schedule gives the same video, so residuals of the branches are not mixed up.
    handle = adacache.enable(model, adacache.Replay(trace), num_steps=STEPS)
    assert relative_error(final, denoise(model, values, STEPS)) < 1e-5


@pytest.mark.parametrize("part", ["temporal_attention", "spatial_attention", "cross_attention_mlp", "block"])
def test_warm_up_call_is_not_part_of_the_request(model: STDiT3, part: str) -> None:
    """A call of another generation at the first timestep, outside `request()`, is not part of the request."""
    values, other = inputs(1, seed=4), inputs(1, seed=5)
    other["z"] *= 3.0
    policy = replace(POLICY, metric_part=part)
    handle = adacache.enable(model, policy, num_steps=STEPS)
    expected, trace = denoise(model, values, STEPS), handle.trace
    adacache.disable(model)
    handle = adacache.enable(model, policy, num_steps=STEPS)
    denoise(model, other, 1)
    assert torch.equal(denoise(model, values, STEPS), expected)
    assert handle.trace.computed == trace.computed
    assert handle.trace.measurements == trace.measurements


def test_requests_are_independent(model: STDiT3) -> None:
    first, second = inputs(1, seed=4), inputs(1, seed=5)
    second["z"] *= 2.0
    handle = adacache.enable(model, POLICY, num_steps=STEPS)
    alone = [denoise(model, first, STEPS), denoise(model, second, STEPS)]
    schedule = handle.trace.computed_steps
    # A second prompt gives the result that a new model gives.
    adacache.disable(model)
    handle = adacache.enable(model, POLICY, num_steps=STEPS)
    assert torch.equal(denoise(model, second, STEPS), alone[1])
    assert handle.trace.computed_steps == schedule
    # Another shape, then the first shape.
    denoise(model, inputs(1, frames=3), STEPS)
    assert torch.equal(denoise(model, first, STEPS), alone[0])


def test_aborted_run_leaves_no_state(model: STDiT3) -> None:
    values = inputs(1, seed=4)
    handle = adacache.enable(model, POLICY, num_steps=STEPS)
    expected = denoise(model, values, STEPS)
    denoise(model, {**values, "z": values["z"] * 3}, 7)  # 7 of STEPS steps
    assert torch.equal(denoise(model, values, STEPS), expected)

    block = model.temporal_blocks[2]
    original = block.mlp.forward

    def fail(x: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt("interrupted")

    block.mlp.forward = fail
    with pytest.raises(KeyboardInterrupt):
        denoise(model, values, STEPS)
    block.mlp.forward = original
    assert torch.equal(denoise(model, values, STEPS), expected)
    with handle.request() as request:
        block.mlp.forward = fail
        with pytest.raises(KeyboardInterrupt):
            denoise(model, values, STEPS)
        block.mlp.forward = original
        assert not request.caches
        with pytest.raises(RuntimeError, match="ended at step 1 by an error"):
            denoise(model, values, STEPS)
    assert torch.equal(denoise(model, values, STEPS), expected)


@pytest.mark.parametrize("explicit", [True, False])
def test_more_calls_than_steps(model: STDiT3, explicit: bool) -> None:
    values = inputs(1)
    handle = adacache.enable(model, adacache.AdaCache(codebook={1.0: 1}), num_steps=4)
    opened = handle.request() if explicit else contextlib.nullcontext()
    message = "num_steps: this request was opened for 4 steps and all have run"
    with pytest.raises(RuntimeError, match=message), opened:
        denoise(model, values, 5)
    assert torch.isfinite(denoise(model, values, 4)).all()
    assert handle.trace.computed_steps == [1, 2, 3, 4]


def test_interleaved_requests(model: STDiT3) -> None:
    """Two interleaved loops on one model, each in its own contextvars.Context."""
    import contextvars

    values = [inputs(1, seed=4), inputs(1, seed=5)]
    values[1]["z"] *= 2.0
    handle = adacache.enable(model, POLICY, num_steps=STEPS)
    alone = [denoise(model, v, STEPS) for v in values]

    def loop(v: dict[str, torch.Tensor]) -> Any:
        with handle.request():
            z = v["z"]
            for i in range(STEPS):
                t = torch.full((2,), (1 - i / STEPS) * 1000)
                out = model(torch.cat((z, z)), t, v["y"], v["mask"], fps=24.0, height=64, width=96)
                conditional, unconditional = out[:, :4].chunk(2)
                z = z + (unconditional + 4.0 * (conditional - unconditional)) / STEPS
                yield z

    contexts = [contextvars.copy_context() for _ in values]
    loops = [loop(v) for v in values]
    with torch.no_grad():
        for _ in range(STEPS):
            finals = [context.run(next, turn) for context, turn in zip(contexts, loops, strict=True)]
    assert torch.equal(finals[0], alone[0])
    assert torch.equal(finals[1], alone[1])
    for context, turn in zip(contexts, loops, strict=True):
        context.run(turn.close)


def test_bad_input_raises_and_the_request_continues(model: STDiT3) -> None:
    values = inputs(1)
    handle = adacache.enable(model, POLICY, num_steps=STEPS)
    x, t = torch.cat((values["z"], values["z"])), torch.full((2,), 1000.0)
    with torch.no_grad(), handle.request() as request:
        model(x, t, values["y"], values["mask"])
        for bad, message in [
            ({"x": x[:, :3]}, r"x: expected \[B, 4, T, H, W\], got \[2, 3, 5, 8, 12\]"),
            ({"timestep": t[:1]}, r"timestep: expected \[B\] = \[2\], got \[1\]"),
            (
                {"x_mask": torch.ones(2, 4, dtype=torch.bool)},
                r"x_mask: expected \[B, T\] = \[2, 5\], got \[2, 4\]",
            ),
            ({"fps": torch.ones(3)}, r"fps: expected"),
        ]:
            with pytest.raises(ValueError, match=message):
                model(**{"x": x, "timestep": t, "y": values["y"], "mask": values["mask"], **bad})
        assert request.step == 1
        model(x, t, values["y"], values["mask"])
        assert request.step == 2


@pytest.mark.parametrize(
    ("y", "mask", "message"),
    [
        (torch.zeros(2, 1, 12, 31), None, r"y: expected \[B, 1, L, 32\]"),
        (torch.zeros(3, 1, 12, 32), None, r"y: expected 2 rows as in x, got \[3, 12, 32\]"),
        (torch.zeros(2, 1, 12, 32), torch.ones(2, 11), r"mask: expected \[B, L\] = \[2, 12\]"),
        (torch.zeros(1, 9, 32), [4, 4], "mask: expected 2 lengths that add up to the 9 packed tokens"),
    ],
)
def test_bad_captions(model: STDiT3, y: torch.Tensor, mask: Any, message: str) -> None:
    values = inputs(1)
    adacache.enable(model, POLICY, num_steps=STEPS)
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        model(torch.cat((values["z"], values["z"])), torch.full((2,), 1000.0), y, mask)
    assert torch.isfinite(denoise(model, values, STEPS)).all()


def test_gradients_raise(model: STDiT3) -> None:
    values = inputs(1)
    adacache.enable(model, POLICY, num_steps=STEPS)
    with pytest.raises(RuntimeError, match=r"inference only: call the model under torch\.no_grad"):
        model(torch.cat((values["z"], values["z"])), torch.full((2,), 1000.0), values["y"])


def test_enable_and_disable_errors(model: STDiT3) -> None:
    with pytest.raises(ValueError, match="model: AdaCache is not enabled"):
        adacache.disable(model)
    with pytest.raises(ValueError, match=r"model: found no list of blocks in torch.nn.modules.linear.Linear"):
        adacache.enable(torch.nn.Linear(2, 2), POLICY, num_steps=4)
    with pytest.raises(ValueError, match="num_steps: expected a whole number"):
        adacache.enable(model, POLICY, num_steps=0)
    handle = adacache.enable(model, POLICY, num_steps=STEPS)
    with pytest.raises(ValueError, match="enabled on it already"):
        adacache.enable(model, POLICY, num_steps=STEPS)
    with pytest.raises(RuntimeError, match="no generation call has run"):
        _ = handle.trace
    with (
        pytest.raises(ValueError, match="num_videos: expected a divisor of the 2 rows"),
        handle.request(num_videos=4),
    ):
        denoise(model, inputs(1), STEPS)
    with pytest.raises(ValueError, match=r"video_of_row\[1\]: expected a whole number in 0\.\.1, got 2"):
        handle.request(num_videos=2, video_of_row=[0, 2]).__enter__()
    with (
        pytest.raises(ValueError, match="video_of_row: expected 2 entries"),
        handle.request(num_videos=2, video_of_row=[0, 1, 1]),
    ):
        denoise(model, inputs(1), STEPS)


def test_site_names_in_execution_order(model: STDiT3) -> None:
    handle = adacache.enable(model, POLICY, num_steps=STEPS)
    assert len(handle.sites) == 24
    assert handle.sites[:4] == [
        "spatial_blocks.0.spatial_attention",
        "spatial_blocks.0.cross_attention",
        "spatial_blocks.0.mlp",
        "temporal_blocks.0.temporal_attention",
    ]


def test_sampler_opens_its_own_request(model: STDiT3) -> None:
    values = inputs(2, seed=1)
    handle = adacache.enable(model, POLICY, num_steps=STEPS)
    flow = RectifiedFlow(num_steps=STEPS, guidance_scale=4.0)
    final = flow.sample(model, values["z"], values["y"], mask=values["mask"], height=64, width=96)
    assert handle.trace.num_videos == 2
    assert handle.current is None
    with handle.request(num_videos=2):
        assert relative_error(final, denoise(model, values, STEPS)) < 1e-5
    with pytest.raises(ValueError, match="enabled for 30 steps, the sampler runs 10"):
        RectifiedFlow(num_steps=10).sample(model, values["z"], values["y"])


def test_image_conditioning_keeps_given_frames_and_caches(model: STDiT3) -> None:
    values = inputs(1, seed=6)
    keep = torch.zeros(1, 5, dtype=torch.bool)
    keep[:, 0] = True
    flow = RectifiedFlow(num_steps=STEPS, guidance_scale=4.0)
    plain = flow.sample(model, values["z"], values["y"], mask=values["mask"], keep=keep)
    handle = adacache.enable(model, POLICY, num_steps=STEPS)
    final = flow.sample(model, values["z"], values["y"], mask=values["mask"], keep=keep)
    assert torch.equal(final[:, :, 0], values["z"][:, :, 0])
    assert len(handle.trace.computed_steps) < STEPS
    assert 0 < relative_error(final, plain) < 0.3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cache_dtype(model: STDiT3, dtype: torch.dtype) -> None:
    values = inputs(1, seed=3)
    handle = adacache.enable(model, POLICY, num_steps=STEPS)
    full = denoise(model, values, STEPS)
    full_trace = handle.trace
    adacache.disable(model)
    handle = adacache.enable(model, replace(POLICY, cache_dtype=dtype), num_steps=STEPS)
    error = relative_error(denoise(model, values, STEPS), full)
    assert 0 < error < 0.02
    tokens = 2 * 5 * 4 * 6 * 96
    assert full_trace.cache_bytes == 2 * tokens * 4
    assert handle.trace.cache_bytes == tokens * 4 + tokens * 2
    adacache.disable(model)
    handle = adacache.enable(model, replace(POLICY, cache="sublayer"), num_steps=STEPS)
    denoise(model, values, STEPS)
    assert handle.trace.cache_bytes == (4 * 4 + 1) * tokens * 4


def test_float8_cache(model: STDiT3) -> None:
    """Memory: one byte per element and one scale per token. A batch has the schedules and results of its
    videos run alone."""
    batch = inputs(2, seed=1)
    batch["z"][1] *= 3.0
    batch["y"][[0, 2]] *= 2.5
    full = adacache.enable(model, POLICY, num_steps=STEPS)
    with full.request(num_videos=2):
        expected = denoise(model, batch, STEPS)
    adacache.disable(model)
    policy = replace(POLICY, cache_dtype=torch.float8_e4m3fn)
    handle = adacache.enable(model, policy, num_steps=STEPS)
    with handle.request(num_videos=2):
        together = denoise(model, batch, STEPS)
    assert handle.trace.steps_of(0) != handle.trace.steps_of(1)
    tokens, channels = 4 * 5 * 4 * 6, 96
    assert handle.trace.cache_bytes == tokens * (4 * channels + channels + 4)
    assert 0 < relative_error(together, expected) < 0.02
    for video in range(2):
        with handle.request(num_videos=1):
            alone = denoise(model, rows_of(batch, video), STEPS)
        assert relative_error(together[video], alone[0]) < 1e-4


def test_metrics_and_rules_run(model: STDiT3) -> None:
    values = inputs(1, seed=3)
    motion = adacache.MotionRegularization(scale=0.03, power=1.0, gradient_weight=1.0)
    for metric in ("l1", "l2", "cosine"):
        handle = adacache.enable(model, replace(POLICY, metric=metric), num_steps=STEPS)
        denoise(model, values, STEPS)
        assert all(v > 0 for _, v in next(iter(handle.trace.series("distance").values())))
        adacache.disable(model)
    absolute = {0.2: 4, 0.24: 2, 1.0: 1}
    handle = adacache.enable(
        model, adacache.AdaCache(codebook=absolute, rule="paper", motion=motion), num_steps=STEPS
    )
    denoise(model, values, STEPS)
    assert 2 < len(handle.trace.computed_steps) < STEPS


def test_nonfinite_residual_forces_compute(model: STDiT3) -> None:
    values = inputs(1, seed=3)
    values["z"][0, 0, 0, 0, 0] = float("nan")
    handle = adacache.enable(model, POLICY, num_steps=8)
    denoise(model, values, 8)
    assert handle.trace.computed_steps == list(range(1, 9))
    assert all(record["nonfinite"] == [True] for record in handle.trace.measurements)

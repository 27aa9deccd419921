# SPDX-License-Identifier: Apache-2.0
"""The serving engine: each video's result is that of its single run."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import adacache
import pytest
import torch
from adacache.digits import FPS, SIZE, encode, noise, with_null
from adacache.digits.captions import all_prompts
from adacache.models.rectified_flow import RectifiedFlow
from adacache.serving import Engine, FlowDenoiser, NoCache
from adacache.sites import MODEL
from serving_cases import (
    ADACACHE,
    CODEBOOK,
    MIXED,
    PATH,
    REPLAY,
    STACK_PATH,
    Wanted,
    batch_error,
    engine,
    join,
    serve,
)
from torch import Tensor

import adacache_kernels


@pytest.mark.parametrize("pack", [True, False], ids=["packed", "in_step"])
def test_videos_equal_their_single_runs(tiny_digit_model: Any, pack: bool) -> None:
    """8 videos with other steps, schedules, guidance scales and policies, in 5 slots full of NaN."""
    model = tiny_digit_model
    truth = [one.alone(model) for one in MIXED]
    # 0 where the model's batching is bit-identical, as in this one; 2e-6 in the shipped digit model.
    tolerance = 4 * batch_error(model, MIXED)
    with engine(model, MIXED, slots=5, pack=pack) as server:
        assert server._pool is not None
        server._pool.memory.fill_(255)
        videos = serve(server, MIXED)
    for video, (expected, steps) in zip(videos, truth, strict=True):
        assert video.error is None
        assert video.trace.computed_steps == steps
        assert float((video.result - expected).abs().max()) <= tolerance
    schedules = {tuple(steps) for one, (_, steps) in zip(MIXED, truth, strict=True) if one.policy is ADACACHE}
    assert len(schedules) > 1


def test_one_video_per_call_is_bit_identical(tiny_digit_model: Any) -> None:
    with engine(tiny_digit_model, MIXED, slots=3, max_batch=1) as server:
        videos = serve(server, MIXED)
    for video, one in zip(videos, MIXED, strict=True):
        assert torch.equal(video.result, one.alone(tiny_digit_model)[0])


class Calls:
    """Counts the rows that the model and its blocks get."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch):
        self.model: list[int] = []
        self.blocks: list[int] = []
        plain_embed, plain_mlp = model.embed, model.temporal_blocks[0].mlp.forward

        def embed(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.model.append(x.shape[0])
            return plain_embed(x, *args, **kwargs)

        def mlp(x: Tensor) -> Tensor:
            self.blocks.append(x.shape[0])
            return plain_mlp(x)

        monkeypatch.setattr(model, "embed", embed)
        monkeypatch.setattr(model.temporal_blocks[0].mlp, "forward", mlp)


def test_rows_that_reuse_do_not_enter_the_blocks(
    tiny_digit_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [[1, 2, 5], [1, 3, 5], [1, 4]]
    wanted = [Wanted(seed, 5, policy=adacache.Replay(computed)) for seed, computed in enumerate(steps)]
    with engine(tiny_digit_model, wanted, pack=False) as server:
        calls = Calls(tiny_digit_model, monkeypatch)
        serve(server, wanted)
    assert calls.model == [6] * 5
    assert calls.blocks == [6, 2, 2, 2, 4]


def test_packing_fills_the_calls_that_compute(tiny_digit_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [[1, 2, 5], [1, 3, 5], [1, 4]]
    wanted = [Wanted(seed, 5, policy=adacache.Replay(computed)) for seed, computed in enumerate(steps)]
    with engine(tiny_digit_model, wanted) as server:
        calls = Calls(tiny_digit_model, monkeypatch)
        serve(server, wanted)
    assert calls.blocks == [6, 6, 4]


def test_a_planned_path_does_not_call_the_model(
    tiny_digit_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [Wanted(0, 8, policy=PATH), Wanted(1, 8, policy=PATH)]
    with engine(tiny_digit_model, wanted) as server:
        calls = Calls(tiny_digit_model, monkeypatch)
        videos = serve(server, wanted)
    assert calls.model == [4] * len(PATH.computed)
    assert [video.trace.computed_steps for video in videos] == [list(PATH.computed)] * 2


def test_known_steps_are_kept(tiny_digit_model: Any) -> None:
    """What `plan_ahead` states is what happens."""
    stated: dict[int, dict[int, bool]] = {}
    with engine(tiny_digit_model, MIXED) as server:
        videos = [join(server, one) for one in MIXED]
        counts = []
        while server.videos:
            for number, video in enumerate(videos):
                if not video.done:
                    stated.setdefault(number, {}).update(video.plan_ahead())
            counts.append(sum(len(known) for known in stated.values()))
            server.step()
    for number, video in enumerate(videos):
        computed = video.trace.computed_steps
        known = stated[number]
        assert set(known) == set(range(1, video.num_steps + 1))
        if video.policy is not STACK_PATH and video.policy is not PATH:
            assert all((step in computed) == compute for step, compute in known.items())
    assert counts[1] > counts[0]


def test_a_nan_stays_in_its_video(tiny_digit_model: Any) -> None:
    wanted = [Wanted(0), Wanted(1), Wanted(2, policy=PATH)]
    with engine(tiny_digit_model, wanted) as server:
        videos = [join(server, one) for one in wanted]
        server.step()
        videos[1].state.latents = videos[1].state.latents * float("nan")
        while server.videos:
            server.step()
    assert not videos[1].result.isfinite().any()
    assert any(any(record["nonfinite"]) for record in videos[1].trace.measurements)
    tolerance = 4 * batch_error(tiny_digit_model, wanted)
    for video, one in ((videos[0], wanted[0]), (videos[2], wanted[2])):
        assert float((video.result - one.alone(tiny_digit_model)[0]).abs().max()) <= tolerance
    # The slot of the broken video is used again.
    with engine(tiny_digit_model, wanted, slots=1) as server:
        broken = join(server, wanted[0])
        broken.state.latents = broken.state.latents * float("nan")
        while server.videos:
            server.step()
        (video,) = serve(server, wanted[1:2])
    assert torch.equal(video.result, wanted[1].alone(tiny_digit_model)[0])


def test_videos_with_other_codebooks_are_decided_in_one_call(
    tiny_digit_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests at other steps of other schedules; the records of each are bit-identical to those of its
    engine with one video per call."""
    motion = adacache.MotionRegularization(window=(0.2, 0.9), scale=0.5)
    policies = [
        adacache.AdaCache(CODEBOOK, motion=motion),
        adacache.AdaCache({0.05: 3, 1.0: 1}, motion=motion),
    ]
    wanted = [Wanted(seed, 9 - seed, policy=policies[seed % 2]) for seed in range(4)]
    sizes: list[int] = []
    decide = adacache_kernels.decide

    def counted(sums: Tensor, *arguments: Any, **settings: Any) -> None:
        sizes.append(len(sums))
        decide(sums, *arguments, **settings)

    records = []
    for most in (1, 4):
        with engine(tiny_digit_model, wanted, slots=4, max_batch=most) as server:
            monkeypatch.setattr(adacache_kernels, "decide", counted)
            videos = [join(server, one) for one in wanted[:2]]
            server.step()  # the others join one step later
            videos += [join(server, one) for one in wanted[2:]]
            while server.videos:
                server.step()
            monkeypatch.undo()
        records.append([video.trace.measurements for video in videos])
    if batch_error(tiny_digit_model, wanted) == 0:
        assert records[0] == records[1]
    measured = sum(len(own) + 1 for own in records[1])  # and the first step of each
    assert sum(sizes[measured:]) == measured
    assert max(sizes[measured:]) == 4
    assert len(sizes) - measured < measured / 2


@pytest.mark.parametrize("where", ["embed", "mlp"])
def test_an_error_ends_the_video_that_causes_it(
    tiny_digit_model: Any, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """The other videos of the call begin again, and their results are exact."""
    model, wanted = tiny_digit_model, [Wanted(0), Wanted(1), Wanted(2, policy=REPLAY)]
    truth = [one.alone(model)[0] for one in wanted]
    guilty = wanted[1].job(model).y
    with engine(model, wanted) as server:
        videos = [join(server, one) for one in wanted]
        for _ in range(2):
            server.step()
        plain, broken = model.with_captions, []

        def with_captions(conditioning: Any, y: Tensor, mask: Any = None) -> Any:
            if y.shape[0] >= 2 and any(torch.equal(row, guilty[0]) for row in y):
                broken.append(y.shape[0])
                raise ZeroDivisionError("a broken prompt")
            return plain(conditioning, y, mask)

        def mlp(x: Tensor) -> Tensor:
            if broken or len(server.videos[0].trace.computed) > 2:
                broken.append(x.shape[0])
                raise ZeroDivisionError("broken")
            return plain_mlp(x)

        plain_mlp = model.temporal_blocks[0].mlp.forward
        with monkeypatch.context() as patch:
            if where == "embed":
                patch.setattr(model, "with_captions", with_captions)
            else:
                patch.setattr(model.temporal_blocks[0].mlp, "forward", mlp)
            for _ in range(40):
                server.step()
                if where == "mlp" and broken:
                    break
        while server.videos:
            server.step()
    assert broken
    for number, video in enumerate(videos):
        if where == "embed" and number == 1:
            assert isinstance(video.error, ZeroDivisionError)
        else:
            assert video.error is None
            assert torch.equal(video.result, truth[number])


def test_leaving_frees_the_slot(tiny_digit_model: Any) -> None:
    with engine(tiny_digit_model, MIXED[:3], slots=2, max_batch=1) as server:
        first, second = join(server, MIXED[0]), join(server, MIXED[1])
        with pytest.raises(RuntimeError, match="slots: all 2 are taken"):
            join(server, MIXED[2])
        server.step()
        server.leave(first)
        assert first.done
        assert server.has_room
        (third,) = serve(server, MIXED[2:3])
        assert second.done
    assert torch.equal(third.result, MIXED[2].alone(tiny_digit_model)[0])
    assert server._pool is not None
    assert server._pool.free == 4


def test_memory_is_allocated_once(tiny_digit_model: Any) -> None:
    with engine(tiny_digit_model, MIXED, slots=4) as server:
        assert server._pool is not None
        memory = server._pool.memory
        serve(server, MIXED)
        assert server._pool.memory is memory
        assert server.cache_bytes == memory.numel() > 0
        used = max(layout.bytes for layout in server._pool._layouts.values())
    assert used == memory.shape[1]


def test_max_cache_bytes(tiny_digit_model: Any) -> None:
    """First fewer bits, then fewer slots; each with a warning."""
    model, wanted = tiny_digit_model, [Wanted(0), Wanted(1)]
    with engine(model, wanted, slots=4) as server:
        whole = server.cache_bytes
    with pytest.warns(UserWarning, match=r"max_cache_bytes=\d+, residuals are kept in torch.bfloat16$"):
        server = engine(model, wanted, slots=4, max_batch=1, max_cache_bytes=whole * 3 // 4)
    with server:
        # The measured residual keeps its dtype, because decisions depend on it.
        assert server.cache_bytes == whole * 3 // 4
        lean = serve(server, wanted)
    exact = Wanted(0, policy=adacache.AdaCache(CODEBOOK, cache_dtype=torch.bfloat16)).alone(model)[0]
    assert torch.equal(lean[0].result, exact)
    assert not torch.equal(lean[0].result, wanted[0].alone(model)[0])
    message = r"residuals are kept in torch.float8_e4m3fn and there are 2 slots, not 4"
    with pytest.warns(UserWarning, match=message):
        server = engine(
            model,
            wanted,
            slots=4,
            max_cache_bytes=whole * 2 // 5,
            leaner=[torch.bfloat16, torch.float8_e4m3fn],
        )
    with server:
        assert server.slots == 2
        assert server.cache_bytes <= whole * 2 // 5
        assert all(video.error is None for video in serve(server, wanted * 2))
    with pytest.raises(ValueError, match=r"max_cache_bytes: one video keeps \d+ bytes, got a limit of 100"):
        engine(model, wanted, max_cache_bytes=100)
    assert not any(name.startswith("_adacache") for name in model.__dict__)


@pytest.mark.parametrize(
    "limits",
    [
        adacache.Limits(ADACACHE, first=2, last=1, most=2),
        adacache.Limits(ADACACHE, mask=[step % 4 == 2 for step in range(9)]),
        adacache.Limits(adacache.Interval(3), first=3),
        adacache.Limits(adacache.TaylorSeer(interval=4), most=2),
    ],
    ids=["ends_and_most", "mask", "interval", "taylorseer"],
)
def test_limited_policies(tiny_digit_model: Any, limits: adacache.Limits) -> None:
    wanted = [Wanted(seed, 9, 2.0 + seed, limits if seed else ADACACHE) for seed in range(3)]
    with engine(tiny_digit_model, wanted, slots=3, max_batch=1) as server:
        videos = [join(server, one) for one in wanted]
        while server.videos:
            ahead = [(video, video.plan_ahead()) for video in server.videos]
            server.step()
            for video, plan in ahead:
                for step, computed in plan.items():
                    if step <= video.step:
                        assert (step in video.trace.computed_steps) == computed
        found = [(video.result, video.trace.computed_steps) for video in videos]
    for (result, steps), one in zip(found, wanted, strict=True):
        expected, computed = one.alone(tiny_digit_model)
        assert steps == computed
        assert torch.equal(result, expected)


def test_limits_of_a_policy_that_is_refused(tiny_digit_model: Any) -> None:
    with engine(tiny_digit_model, [Wanted(0)]) as server:
        for inner, reason in (
            (adacache.EasyCache(), "measures inputs"),
            (adacache.MagRatios(), "reads kept"),
        ):
            with pytest.raises(ValueError, match=f"Limits {reason}"):
                server.join(Wanted(0).job(tiny_digit_model), adacache.Limits(inner))


def test_a_job_that_does_not_fit_is_refused(tiny_digit_model: Any) -> None:
    model = tiny_digit_model
    larger = Wanted(0).job(model)
    larger.z = larger.z.repeat(1, 1, 2, 1, 1)
    with engine(model, [Wanted(0)]) as server:
        with pytest.raises(ValueError, match=r"job: its kept tensors need \d+ bytes .* pass largest="):
            server.join(larger)
        with pytest.raises(ValueError, match=r"job: its kept tensors need \d+ bytes"):
            server.join(Wanted(0).job(model), adacache.AdaCache(CODEBOOK, cache="block"))
        with pytest.raises(ValueError, match="EasyCache measures inputs before it plans a step"):
            server.join(Wanted(0).job(model), adacache.EasyCache())
        job = Wanted(0).job(model)
        job.y = job.y[:1]
        with pytest.raises(ValueError, match="y: expected 2 rows"):
            server.join(job)
        assert server.videos == []
        # Smaller ones share the rows.
        smaller = Wanted(1, policy=ADACACHE).job(model)
        smaller.z = smaller.z[:, :, :8]
        videos = [server.join(smaller), join(server, Wanted(0))]
        while server.videos:
            server.step()
    assert torch.equal(videos[1].result, Wanted(0).alone(model)[0])
    handle = adacache.enable(model, ADACACHE, num_steps=9)
    flow = RectifiedFlow(9, 2.5)
    expected = flow.sample(model, smaller.z, smaller.y, fps=FPS, height=SIZE, width=SIZE)
    adacache.disable(model)
    assert handle.trace.computed_steps == videos[0].trace.computed_steps
    assert torch.equal(videos[0].result, expected)


def test_the_model_is_restored(tiny_digit_model: Any) -> None:
    model = tiny_digit_model
    plain = type(model)
    with engine(model, MIXED) as server:
        with pytest.raises(ValueError, match="AdaCache is enabled on it already"):
            adacache.enable(model, ADACACHE, num_steps=9)
        with pytest.raises(ValueError, match="AdaCache is enabled on it already"):
            Engine(FlowDenoiser(model, RectifiedFlow(9)), ADACACHE)
        # Calls that are not the engine's run without caching.
        video = Wanted(0, policy=None).alone(copy.deepcopy(model))[0]
        job = Wanted(0).job(model)
        assert torch.equal(
            RectifiedFlow(9, 2.5).sample(model, job.z, job.y, fps=FPS, height=SIZE, width=SIZE), video
        )
        running = join(server, MIXED[0])
    assert running.done
    with pytest.raises(RuntimeError, match="engine: it was closed"):
        join(server, MIXED[0])
    with engine(model, MIXED[:1]) as server:
        join(server, MIXED[0])
        adacache.disable(model)
        with pytest.raises(RuntimeError, match="AdaCache was disabled on its model"):
            server.step()
    assert type(model) is plain
    assert "_adacache_handle" not in model.__dict__


def test_presets_by_name(tiny_digit_model: Any) -> None:
    y = with_null(tiny_digit_model, encode([all_prompts()[0]]))
    with Engine(FlowDenoiser(tiny_digit_model, RectifiedFlow(30)), "digits/fast", slots=1) as server:
        job = Wanted(0, 30).job(tiny_digit_model)
        assert torch.equal(job.y, y)
        video = server.join(job)
        while server.videos:
            server.step()
    assert video.trace.policy["policy"] == "AdaCache"


def test_policies_without_kept_blocks_need_little_memory(tiny_digit_model: Any) -> None:
    with engine(tiny_digit_model, [Wanted(0, policy=None)]) as server:
        assert server.cache_bytes == 0
        (video,) = serve(server, [Wanted(0, policy=None)])
        assert video.request.decider.keeps == {}
    with engine(tiny_digit_model, [Wanted(0, 8, policy=PATH)], slots=1) as server:
        (video,) = serve(server, [Wanted(0, 8, policy=PATH)])
        assert list(video.request.decider.keeps) == [MODEL]
        assert server.cache_bytes == 2 * 2 * noise([0]).numel() * 4


def test_arguments_are_checked(tiny_digit_model: Any) -> None:
    denoiser = FlowDenoiser(tiny_digit_model, RectifiedFlow(9))
    for settings, message in (
        ({"slots": 0}, "slots: expected a whole number of at least 1"),
        ({"max_batch": 0}, "max_batch: expected"),
        ({"max_cache_bytes": 1.5}, "max_cache_bytes: expected"),
        ({"leaner": [torch.int8]}, "leaner: expected bfloat16"),
    ):
        with pytest.raises(ValueError, match=message):
            Engine(denoiser, ADACACHE, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Engine(denoiser, NoCache()).close()

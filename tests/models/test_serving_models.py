# SPDX-License-Identifier: Apache-2.0
"""The serving engine on diffusers' Wan, whose blocks are wrapped; guidance in two calls and in one batch."""

from __future__ import annotations

from typing import Any

import adacache
import pytest
import torch
from adacache.serving import DiffusersDenoiser, DiffusersJob, Engine, NoCache, Video
from model_cases import CODEBOOK, WAN
from torch import Tensor

diffusers = pytest.importorskip("diffusers")

POLICIES: list[Any] = [
    adacache.AdaCache(CODEBOOK),
    adacache.Replay([1, 2, 4, 6, 8]),
    adacache.PlannedPath([1, 2, 4, 7], [0.0, 0.9, 0.8, 0.5]),
    None,
    adacache.AdaCache({0.3: 3, 1.0: 2}),
]
STEPS = [9, 8, 7, 5, 10]


@pytest.fixture(scope="module")
def model() -> Any:
    return WAN.model()


def scheduler() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


def job(seed: int) -> DiffusersJob:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, 4, 3, 4, 4, generator=generator)
    texts = [{"encoder_hidden_states": torch.randn(1, 5, 12, generator=generator)} for _ in range(2)]
    return DiffusersJob(latents, texts, 2.0 + seed, STEPS[seed])


@torch.no_grad()
def alone(model: Any, seed: int, one_batch: bool, policy: Any) -> tuple[Tensor, list[int]]:
    """A loop as diffusers' pipeline has it."""
    own, steps = job(seed), scheduler()
    steps.set_timesteps(own.num_steps)
    latents = own.latents
    handle = adacache.enable(model, policy or NoCache(), num_steps=own.num_steps)
    try:
        with handle.request(branches=1 if one_batch else 2) as request:
            texts = [one["encoder_hidden_states"] for one in own.conditions]
            for t in steps.timesteps:
                if one_batch:
                    out = model(torch.cat([latents] * 2), t.expand(2), torch.cat(texts), return_dict=False)[
                        0
                    ].chunk(2)
                else:
                    out = [model(latents, t.expand(1), text, return_dict=False)[0] for text in texts]
                guided = out[1] + own.guidance_scale * (out[0] - out[1])
                latents = steps.step(guided, t, latents, return_dict=False)[0]
        return latents, request.trace.computed_steps
    finally:
        adacache.disable(model)


def serve(model: Any, one_batch: bool, **settings: Any) -> list[Video]:
    policies = [policy for policy in POLICIES if policy is not None]
    denoiser = DiffusersDenoiser(model, scheduler(), one_batch=one_batch)
    with Engine(denoiser, policies[0], policies=policies, largest=job(0), **settings) as server:
        assert server._pool is not None
        server._pool.memory.fill_(255)
        waiting, videos = list(range(len(POLICIES))), []
        while waiting or server.videos:
            while waiting and server.has_room:
                seed = waiting.pop(0)
                videos.append(server.join(job(seed), POLICIES[seed] or NoCache()))
            server.step()
    return videos


def batch_error(model: Any) -> float:
    """The largest difference that the model's batching makes in one call."""
    jobs = [job(seed) for seed in range(len(POLICIES))]
    latents = torch.cat([one.latents for one in jobs])
    text = torch.cat([one.conditions[0]["encoder_hidden_states"] for one in jobs])
    with torch.no_grad():
        t = torch.full((len(jobs),), 500.0)
        together = model(latents, t, text, return_dict=False)[0]
        apart = [
            model(latents[i : i + 1], t[:1], text[i : i + 1], return_dict=False)[0] for i in range(len(jobs))
        ]
    return float((together - torch.cat(apart)).abs().max())


@pytest.mark.filterwarnings("ignore:AdaCache. of . steps")
@pytest.mark.parametrize("one_batch", [False, True], ids=["two_calls", "one_batch"])
def test_videos_equal_their_single_runs(model: Any, one_batch: bool) -> None:
    truth = [alone(model, seed, one_batch, policy) for seed, policy in enumerate(POLICIES)]
    # Guidance weights of up to 6 scale the differences of one call, over up to 10 steps.
    tolerance = 60 * batch_error(model) + 1e-6
    assert tolerance < 1e-3
    for settings in ({"slots": 3}, {"slots": 2, "max_batch": 1}):
        videos = serve(model, one_batch, **settings)
        for video, (expected, steps) in zip(videos, truth, strict=True):
            assert video.error is None
            assert video.trace.computed_steps == steps
            if "max_batch" in settings:
                assert torch.equal(video.result, expected)
            else:
                assert float((video.result - expected).abs().max()) <= tolerance
    assert len({tuple(steps) for _, steps in truth}) == len(POLICIES)


def test_jobs_are_checked(model: Any) -> None:
    with Engine(DiffusersDenoiser(model, scheduler()), POLICIES[0]) as server:
        wrong = job(0)
        wrong.conditions = wrong.conditions[:1]
        with pytest.raises(ValueError, match="conditions: expected 2, conditional first, got 1"):
            server.join(wrong)
        wrong = job(0)
        wrong.latents = wrong.latents.repeat(2, 1, 1, 1, 1)
        with pytest.raises(ValueError, match=r"latents: expected one video"):
            server.join(wrong)

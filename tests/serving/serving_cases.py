# SPDX-License-Identifier: Apache-2.0
"""Jobs on a small digit model, and the same videos generated one by one."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import adacache
import torch
from adacache.digits import FPS, SIZE, encode, noise, with_null
from adacache.digits.captions import all_prompts
from adacache.models.rectified_flow import RectifiedFlow
from adacache.serving import Engine, FlowDenoiser, FlowJob, NoCache, Video
from torch import Tensor

CODEBOOK = {0.02: 4, 0.1: 3, 0.3: 2, 1.0: 1}
ADACACHE = adacache.AdaCache(CODEBOOK)
PATH = adacache.PlannedPath([1, 2, 4, 7], [0.0, 0.9, 0.8, 0.5])
STACK_PATH = adacache.PlannedPath([1, 3, 5, 7], [0.7, 0.9, 0.8, 0.5], level="stack")
REPLAY = adacache.Replay([1, 2, 4, 6])
FLOAT8 = adacache.AdaCache(CODEBOOK, cache_dtype=torch.float8_e4m3fn)


@dataclass(frozen=True)
class Wanted:
    """A video: its seed and prompt, steps, guidance scale and policy; None: no cache."""

    seed: int
    steps: int = 9
    guidance: float = 2.5
    policy: Any = ADACACHE

    def job(self, model: Any) -> FlowJob:
        y = with_null(model, encode([all_prompts()[self.seed]]))
        # Videos differ in scale, so that their schedules differ.
        z = noise([self.seed]) * (0.3 + self.seed % 3)
        return FlowJob(z, y, self.guidance, self.steps, fps=FPS, height=SIZE, width=SIZE)

    def alone(self, model: Any) -> tuple[Tensor, list[int]]:
        """The video of a plain call of the sampler, and its computed steps."""
        job = self.job(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # few steps
            handle = (
                None if self.policy is None else adacache.enable(model, self.policy, num_steps=self.steps)
            )
        try:
            flow = RectifiedFlow(self.steps, self.guidance)
            video = flow.sample(model, job.z, job.y, fps=FPS, height=SIZE, width=SIZE)
            steps = list(range(1, self.steps + 1)) if handle is None else handle.trace.computed_steps
            return video, steps
        finally:
            if handle is not None:
                adacache.disable(model)


MIXED = [
    Wanted(0, 9, 2.5),
    Wanted(1, 6, 4.0, REPLAY),
    Wanted(2, 8, 2.5, PATH),
    Wanted(3, 5, 1.5, None),
    Wanted(4, 9, 3.0),
    Wanted(5, 8, 2.0, STACK_PATH),
    Wanted(6, 11, 2.5, FLOAT8),
    Wanted(7, 7, 2.5, adacache.AdaCache(CODEBOOK, cache="block")),
]


def engine(model: Any, wanted: list[Wanted], **settings: Any) -> Engine:
    policies = [one.policy for one in wanted if one.policy is not None]
    return Engine(
        FlowDenoiser(model, RectifiedFlow(9)),
        policies[0] if policies else None,
        policies=policies,
        largest=wanted[0].job(model),
        **settings,
    )


def join(server: Engine, one: Wanted) -> Video:
    return server.join(one.job(server.denoiser.model), NoCache() if one.policy is None else one.policy)


def serve(server: Engine, wanted: list[Wanted]) -> list[Video]:
    """The videos, each of which joins as soon as there is a slot."""
    waiting, joined = list(wanted), []
    while waiting or server.videos:
        while waiting and server.has_room:
            joined.append(join(server, waiting.pop(0)))
        server.step()
    return joined


def batch_error(model: Any, wanted: list[Wanted]) -> float:
    """The largest difference that the model's own batching makes, without a cache."""
    jobs = [one.job(model) for one in wanted]
    z = torch.cat([job.z for job in jobs])
    y = torch.cat([job.y[:1] for job in jobs] + [job.y[1:] for job in jobs])
    flow = RectifiedFlow(9, 2.5)
    settings = {"fps": FPS, "height": SIZE, "width": SIZE}
    together = flow.sample(model, z, y, **settings)
    apart = torch.cat([flow.sample(model, job.z, job.y, **settings) for job in jobs])
    return float((together - apart).abs().max())

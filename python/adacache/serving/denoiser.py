# SPDX-License-Identifier: Apache-2.0
"""How a server denoises: the arguments of the model for rows of several videos, guidance, and the sampler's
step. Each video has its own schedule, guidance scale and prompt."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from adacache.models.rectified_flow import RectifiedFlow


class Denoising(Protocol):
    """One video under way.

    Attributes:
        latents: [1, ...].
        num_steps: of its schedule.
        rows: that it has in the batch of a forward call: 2 with guidance in one batch.
        shape: videos of equal shape can be in one call.
    """

    latents: Tensor
    num_steps: int
    rows: int
    shape: Hashable

    def timestep(self, step: int) -> float:
        """The timestep of a step (from 1)."""


class Denoiser(Protocol):
    """A model with its sampler.

    Attributes:
        model: is called once per step, or `branches` times.
        branches: forward calls per step: 2 with guidance in two calls.
    """

    model: nn.Module
    branches: int

    def start(self, job: Any) -> Any:
        """A `Denoising` from a job; called again if the video has to be restarted.

        Raises:
            ValueError: the job does not fit.
        """

    def inputs(
        self, rows: Sequence[tuple[Any, int]], step_of: Mapping[Any, int], branch: int
    ) -> tuple[Sequence[Any], Mapping[str, Any]]:
        """Arguments of the model for rows: (video, its copy in the batch) each.

        Args:
            step_of: the step (from 1) that each video is at.
            branch: number of the call within the step.
        """

    def output(self, returned: Any) -> Tensor:
        """The tensor [rows, ...] in what the model returned."""

    def advance(self, video: Any, step: int, outputs: Sequence[Tensor]) -> None:
        """Takes a step of the sampler.

        Args:
            outputs: per forward call of the step, the model's output [video.rows, ...].
        """

    def result(self, video: Any) -> Any:
        """What the job gives after the last step."""


@dataclass
class FlowJob:
    """A video of STDiT3 with rectified flow.

    Attributes:
        z: noise [1, C, T, H, W].
        y: captions [2, 1, L, channels]: conditional, unconditional.
        guidance_scale, num_steps: of this video; None: those of the sampler.
        mask: [1 or 2, L], valid caption tokens; None: all.
        fps, height, width: see `RectifiedFlow.sample`.
    """

    z: Tensor
    y: Tensor
    guidance_scale: float | None = None
    num_steps: int | None = None
    mask: Tensor | None = None
    fps: float = 24.0
    height: float | None = None
    width: float | None = None


@dataclass(eq=False)
class FlowVideo:
    """A `Denoising` of rectified flow."""

    latents: Tensor
    y: Tensor
    mask: Tensor | None
    guidance_scale: float
    times: list[float]
    fps: float
    height: float
    width: float
    rows: int = 2

    @property
    def num_steps(self) -> int:
        return len(self.times) - 1

    @property
    def shape(self) -> Hashable:
        mask = None if self.mask is None else self.mask.shape[1]
        return tuple(self.latents.shape), tuple(self.y.shape), mask, self.height, self.width

    def timestep(self, step: int) -> float:
        return self.times[step - 1]


class FlowDenoiser:
    """STDiT3, such as the digit model, with rectified flow. Jobs are `FlowJob`s. A video's result is that of
    `RectifiedFlow.sample` for this video alone.

    Args:
        sampler: schedule and guidance scale of videos that state none.
    """

    branches = 1

    def __init__(self, model: nn.Module, sampler: RectifiedFlow):
        self.model = model
        self.sampler = sampler

    def start(self, job: FlowJob) -> FlowVideo:
        z, y = job.z, job.y
        if z.ndim != 5 or z.shape[0] != 1:
            raise ValueError(f"z: expected [1, C, T, H, W], got {list(z.shape)}")
        if y.shape[0] != 2:
            raise ValueError(f"y: expected 2 rows, conditional first, got {y.shape[0]}")
        sampler = self.sampler
        steps = sampler.num_steps if job.num_steps is None else job.num_steps
        if steps < 1:
            raise ValueError(f"num_steps: expected at least 1, got {steps}")
        height = 8.0 * z.shape[3] if job.height is None else job.height
        width = 8.0 * z.shape[4] if job.width is None else job.width
        flow = RectifiedFlow(steps, sampler.guidance_scale, sampler.use_timestep_transform)
        times = [*flow.timesteps(height=height, width=width, latent_frames=z.shape[2]), 0.0]
        scale = sampler.guidance_scale if job.guidance_scale is None else job.guidance_scale
        mask = job.mask
        if mask is not None and mask.shape[0] == 1:
            mask = mask.expand(2, -1)
        return FlowVideo(z, y, mask, scale, times, job.fps, height, width)

    def inputs(
        self, rows: Sequence[tuple[FlowVideo, int]], step_of: Mapping[FlowVideo, int], branch: int
    ) -> tuple[Sequence[Any], Mapping[str, Any]]:
        first = rows[0][0]
        device = first.latents.device
        x = torch.cat([video.latents for video, _ in rows])
        t = torch.tensor([video.timestep(step_of[video]) for video, _ in rows]).to(device)
        y = torch.cat([video.y[copy : copy + 1] for video, copy in rows])
        mask = None
        if first.mask is not None:
            mask = torch.cat([video.mask[copy : copy + 1] for video, copy in rows if video.mask is not None])
        fps: Tensor | float = first.fps
        if any(video.fps != fps for video, _ in rows):
            fps = torch.tensor([video.fps for video, _ in rows]).to(device)
        return (x, t, y), {"mask": mask, "fps": fps, "height": first.height, "width": first.width}

    def output(self, returned: Any) -> Tensor:
        found: Tensor = returned
        return found

    def advance(self, video: FlowVideo, step: int, outputs: Sequence[Tensor]) -> None:
        conditional, unconditional = outputs[0][:, : video.latents.shape[1]].chunk(2)
        velocity = unconditional + video.guidance_scale * (conditional - unconditional)
        now, then = video.times[step - 1], video.times[step]
        video.latents = self.sampler.step(velocity, now, video.latents, next_timestep=then)

    def result(self, video: FlowVideo) -> Tensor:
        return video.latents


@dataclass
class DiffusersJob:
    """A video of a diffusers transformer.

    Attributes:
        latents: noise [1, ...], in the scheduler's initial scale.
        conditions: further arguments of the transformer [1, ...] per guidance branch: conditional,
            unconditional; one without guidance.
        guidance_scale: weight of classifier-free guidance.
        num_steps: of the scheduler.
        seed: of the noise that the scheduler draws; None: it draws none.
    """

    latents: Tensor
    conditions: Sequence[Mapping[str, Any]]
    guidance_scale: float = 1.0
    num_steps: int = 50
    seed: int | None = None


@dataclass(eq=False)
class DiffusersVideo:
    """A `Denoising` of a diffusers transformer."""

    latents: Tensor
    conditions: Sequence[Mapping[str, Any]]
    guidance_scale: float
    scheduler: Any
    timesteps: Tensor
    times: list[float]
    rows: int
    generator: torch.Generator | None = None

    @property
    def num_steps(self) -> int:
        return len(self.times)

    @property
    def shape(self) -> Hashable:
        def of(value: Any) -> Hashable:
            return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else repr(value)

        conditions = tuple(
            (name, of(value)) for one in self.conditions for name, value in sorted(one.items())
        )
        return tuple(self.latents.shape), self.latents.dtype, self.rows, conditions

    def timestep(self, step: int) -> float:
        return self.times[step - 1]


class DiffusersDenoiser:
    """A transformer of diffusers with one of its schedulers. Jobs are `DiffusersJob`s.

    Args:
        scheduler: is copied for each video.
        one_batch: guidance is in one batch of 2 rows per video; else in two calls.
        latents, timestep: names of these arguments of the transformer.
    """

    def __init__(
        self,
        model: nn.Module,
        scheduler: Any,
        *,
        guided: bool = True,
        one_batch: bool = False,
        latents: str = "hidden_states",
        timestep: str = "timestep",
    ):
        self.model = model
        self.scheduler = scheduler
        self.guided = guided
        self.branches = 2 if guided and not one_batch else 1
        self._latents = latents
        self._timestep = timestep

    def start(self, job: DiffusersJob) -> DiffusersVideo:
        expected = 2 if self.guided else 1
        if len(job.conditions) != expected:
            raise ValueError(
                f"conditions: expected {expected}, {'conditional first' if self.guided else 'no guidance'}, "
                f"got {len(job.conditions)}"
            )
        if job.latents.shape[0] != 1:
            raise ValueError(f"latents: expected one video [1, ...], got {list(job.latents.shape)}")
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(job.num_steps, device=job.latents.device)
        times = [float(one) for one in scheduler.timesteps]
        generator = None if job.seed is None else torch.Generator().manual_seed(job.seed)
        rows = expected // self.branches
        return DiffusersVideo(
            job.latents,
            job.conditions,
            job.guidance_scale,
            scheduler,
            scheduler.timesteps,
            times,
            rows,
            generator,
        )

    def inputs(
        self, rows: Sequence[tuple[DiffusersVideo, int]], step_of: Mapping[DiffusersVideo, int], branch: int
    ) -> tuple[Sequence[Any], Mapping[str, Any]]:
        conditions = [video.conditions[branch if self.branches > 1 else copy] for video, copy in rows]
        times = [video.timesteps[step_of[video] - 1] for video, _ in rows]
        scaled = [
            getattr(video.scheduler, "scale_model_input", lambda sample, timestep: sample)(
                video.latents, time
            )
            for (video, _), time in zip(rows, times, strict=True)
        ]
        given = {
            name: torch.cat([one[name] for one in conditions]) if isinstance(value, Tensor) else value
            for name, value in conditions[0].items()
        }
        given |= {self._latents: torch.cat(scaled), self._timestep: torch.stack(times)}
        return (), {**given, "return_dict": False}

    def output(self, returned: Any) -> Tensor:
        found: Tensor = returned[0]
        return found

    def advance(self, video: DiffusersVideo, step: int, outputs: Sequence[Tensor]) -> None:
        parts = list(outputs) if self.branches > 1 else list(outputs[0].chunk(video.rows))
        output = parts[0]
        if len(parts) > 1:
            output = parts[1] + video.guidance_scale * (parts[0] - parts[1])
        drawn = {} if video.generator is None else {"generator": video.generator}
        time = video.timesteps[step - 1]
        video.latents = video.scheduler.step(output, time, video.latents, return_dict=False, **drawn)[0]

    def result(self, video: DiffusersVideo) -> Tensor:
        return video.latents

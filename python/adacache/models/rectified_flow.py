# SPDX-License-Identifier: Apache-2.0
"""Rectified-flow sampler with timestep transform and classifier-free guidance, as Open-Sora 1.2 samples
STDiT3."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from adacache.models.stdit3 import STDiT3

Progress = Callable[[Iterable[int]], Iterable[int]]


def timestep_transform(t: Tensor, *, height: float, width: float, latent_frames: int) -> Tensor:
    """Spends more steps at high noise for larger videos (Open-Sora 1.2's transform; base: one frame of
    512x512).

    Args:
        t: timesteps in 0..1000.
        height, width: pixels of the video.
        latent_frames: frames of the latent.
    """
    ratio = (height * width / 512**2) ** 0.5 * latent_frames**0.5
    t = t / 1000.0
    return ratio * t / (1 + (ratio - 1) * t) * 1000.0


def guided_velocity(
    model: nn.Module, z: Tensor, timestep: float, y: Tensor, guidance_scale: float, **conditions: Any
) -> Tensor:
    """The guided velocity at `timestep`: uncond + guidance_scale * (cond - uncond), both in one batch.

    Args:
        z: [V, C, T, H, W] latents.
        y: [2V, 1, L, channels] captions, the V conditional ones first, then the V unconditional ones.
        conditions: further keyword arguments of the model, for all 2V rows.
    """
    rows = torch.cat((z, z))
    t = torch.full((rows.shape[0],), timestep, device=z.device)
    conditional, unconditional = model(rows, t, y, **conditions)[:, : z.shape[1]].chunk(2)
    return unconditional + guidance_scale * (conditional - unconditional)


@dataclass(frozen=True)
class RectifiedFlow:
    """Euler steps from noise to video along the learned velocity.

    Attributes:
        num_steps: denoising steps.
        guidance_scale: weight of classifier-free guidance; 1 follows the caption without extrapolation.
        use_timestep_transform: place the timesteps by `timestep_transform` rather than evenly.
    """

    num_steps: int = 30
    guidance_scale: float = 7.0
    use_timestep_transform: bool = False

    def timesteps(self, *, height: float, width: float, latent_frames: int) -> list[float]:
        """The timesteps in falling order, 1000 first."""
        t = (1 - torch.arange(self.num_steps, dtype=torch.float64) / self.num_steps) * 1000
        if self.use_timestep_transform:
            t = timestep_transform(t, height=height, width=width, latent_frames=latent_frames)
        return [float(value) for value in t]

    def step(self, output: Tensor, timestep: float, sample: Tensor, *, next_timestep: float) -> Tensor:
        """The latents at the next timestep.

        Args:
            output: the guided velocity at `timestep`.
            sample: the latents there.
        """
        return sample + output * ((timestep - next_timestep) / 1000.0)

    @torch.no_grad()
    def sample(
        self,
        model: nn.Module,
        z: Tensor,
        y: Tensor,
        *,
        mask: Tensor | None = None,
        keep: Tensor | None = None,
        fps: float = 24.0,
        height: float | None = None,
        width: float | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Videos (latents) from noise.

        Args:
            model: an `STDiT3`; if AdaCache is enabled on it, this call is one request of V videos.
            z: [V, C, T, H, W] noise, at the frames in `keep` the given latent.
            y: [2V, 1, L, channels] captions, conditional rows first.
            mask: [V or 2V, L] of valid caption tokens.
            keep: [V, T] bool, True for given frames, which are not changed (image conditioning).
            fps: frames per second of the video.
            height, width: pixels of the video; None: 8 times the latent's size.
            progress: wraps the iterator over steps, e.g. `tqdm`.

        Returns:
            [V, C, T, H, W].

        Raises:
            ValueError: y does not have 2V rows, or num_steps < 1.
        """
        if self.num_steps < 1:
            raise ValueError(f"num_steps: expected at least 1, got {self.num_steps}")
        if y.shape[0] != 2 * z.shape[0]:
            raise ValueError(f"y: expected 2V = {2 * z.shape[0]} rows, conditional first, got {y.shape[0]}")
        height = 8.0 * z.shape[3] if height is None else height
        width = 8.0 * z.shape[4] if width is None else width
        generated = None if keep is None else ~keep
        conditions = {"mask": mask, "fps": fps, "height": height, "width": width}
        if generated is not None:
            conditions["x_mask"] = generated.repeat(2, 1)
        times = [*self.timesteps(height=height, width=width, latent_frames=z.shape[2]), 0.0]
        steps: Iterable[int] = range(self.num_steps)
        generation = cast(STDiT3, model).generation
        with generation(num_steps=self.num_steps, num_videos=z.shape[0]):
            for i in steps if progress is None else progress(steps):
                velocity = guided_velocity(model, z, times[i], y, self.guidance_scale, **conditions)
                moved = self.step(velocity, times[i], z, next_timestep=times[i + 1])
                z = moved if generated is None else torch.where(generated[:, None, :, None, None], moved, z)
        return z

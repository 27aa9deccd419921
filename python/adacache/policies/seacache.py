# SPDX-License-Identifier: Apache-2.0
"""SeaCache (arXiv 2602.18993): the change of the latents is measured after a filter that passes what the
model can tell from noise at this noise level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adacache.checks import array, number, whole
from adacache.policies.accumulating import Accumulating, actions
from adacache.policies.base import (
    Action,
    Keep,
    Plan,
    Step,
    Sums,
    Watch,
    check_dtype,
    check_steps,
    described,
    relative_changes,
)
from adacache.policies.taylorseer import taylor_weights
from adacache.rows import to_device
from adacache.sites import LATENTS, ModelSites, Site


@dataclass(frozen=True)
class SeaCache:
    """Adds up mean|I - I'| / mean|I'|, where I is the filtered latent and I' that of the step before. While
    the sum is below the threshold, the residual of the stack is forecast; else the step is computed and the
    sum starts at 0. The filter has the gain a * P / (a^2 * P + s^2) per axis with P = |frequency|^-power, s =
    sigma and a = 1 - sigma, multiplied over the axes and scaled to mean 1.

    Attributes:
        threshold: published: 0.25.
        order: of the forecast over the step index: 0 (reuse) or 1 (published).
        first, last: numbers of steps at the start and at the end that are computed (published: 1 and 1).
        most: the most skipped steps in a row (published: 2).
        power: exponent of the clean signal's spectrum (published for video: 3).
        axes: dimensions of the latents that the filter is over: frames, height and width.
        scale: sigma = timestep / scale.
        cache_dtype: dtype of the kept factors; None: that of the tokens.

    Each step reads the timestep, and one number per video before the first block, from the device.
    """

    threshold: float = 0.25
    order: int = 1
    first: int = 1
    last: int = 1
    most: int = 2
    power: float = 3.0
    axes: Sequence[int] = (2, 3, 4)
    scale: float = 1000.0
    cache_dtype: torch.dtype | None = None

    per_video = True

    def __post_init__(self) -> None:
        number(above=0)(self.threshold, "threshold")
        whole(0, 1)(self.order, "order")
        whole(1)(self.first, "first")
        whole(0)(self.last, "last")
        whole(1)(self.most, "most")
        number(above=0)(self.power, "power")
        number(above=0)(self.scale, "scale")
        object.__setattr__(self, "axes", tuple(array(whole(1), least=1)(list(self.axes), "axes")))
        check_dtype(self.cache_dtype)
        if self.order and self.cache_dtype == torch.float8_e4m3fn:
            raise ValueError(
                "cache_dtype: expected float32, bfloat16, float16 or None with order > 0, got float8_e4m3fn"
            )

    def check(self, sites: ModelSites, num_steps: int) -> None:
        check_steps(num_steps)

    def start(
        self, sites: ModelSites, num_steps: int, num_videos: int, device: torch.device
    ) -> SeaCacheDecider:
        self.check(sites, num_steps)
        return SeaCacheDecider(self, sites, num_videos, device)

    def describe(self) -> dict[str, Any]:
        return described(self)

    def filtered(self, latents: Tensor, sigma: float) -> Tensor:
        """The latents [B, ...] after the filter."""
        if max(self.axes) >= latents.ndim:
            raise ValueError(
                f"axes: expected dimensions of the latents {list(latents.shape)}, got {self.axes}"
            )
        sigma = max(1e-6, min(1 - 1e-6, sigma))
        gain = torch.ones((), device=latents.device)
        for axis in self.axes:
            size = latents.shape[axis]
            frequency = torch.fft.fftfreq(size, device=latents.device).abs()
            # a * P / (a^2 * P + s^2) with numerator and denominator times |frequency|^power.
            own = (1 - sigma) / ((1 - sigma) ** 2 + sigma**2 * frequency**self.power)
            gain = gain * own.view([size if i == axis else 1 for i in range(latents.ndim)])
        spectrum = torch.fft.fftn(latents.float(), dim=self.axes)
        return torch.fft.ifftn(spectrum * (gain / gain.mean()), dim=self.axes).real


PRESETS = {"seacache/video": SeaCache()}


class SeaCacheDecider(Accumulating):
    """SeaCache at work on one request."""

    needs_timestep = True

    def __init__(self, policy: SeaCache, sites: ModelSites, num_videos: int, device: torch.device):
        super().__init__(policy.threshold, num_videos, first=policy.first, last=policy.last, most=policy.most)
        self._policy = policy
        self._stack = sites.stack
        self._device = device
        self._sigma = 1.0
        self._computed = [1] * num_videos
        self.keeps = {sites.stack: Keep(factors=policy.order + 1, dtype=policy.cache_dtype)}
        self.signals = {LATENTS: Watch(transform=lambda x: policy.filtered(x, self._sigma))}

    def plan(self, step: Step) -> Plan:
        if step.timestep is not None:
            self._sigma = step.timestep / self._policy.scale
        return Plan()

    def observe(self, step: Step, site: Site, sums: Sums) -> Plan:
        skipped = self.skips(step, relative_changes(sums), "filtered latents")
        self._computed = [
            last if own else step.number for last, own in zip(self._computed, skipped, strict=True)
        ]
        if not self._policy.order or not any(skipped):
            return Plan({self._stack: actions(skipped)})
        weights = [taylor_weights(self._policy.order, step.number - last) for last in self._computed]
        rows = to_device(torch.tensor(weights, dtype=torch.float32), self._device)
        return Plan({self._stack: actions(skipped, Action.FORECAST)}, {self._stack: rows})

    def overruled(self, step: Step, site: Site, videos: Sequence[int]) -> None:
        super().overruled(step, site, videos)
        for video in videos:
            self._computed[video] = step.number

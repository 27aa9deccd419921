# SPDX-License-Identifier: Apache-2.0
"""Small networks, inputs and a reference implementation of AdaCache for tests/layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from adacache.models.modulation import gated
from adacache.models.stdit3 import Modulation, STDiT3, STDiT3Config, add_residual
from torch import Tensor

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CODEBOOK = {0.08: 6, 0.16: 5, 0.24: 4, 0.32: 3, 0.4: 2, 1.0: 1}


def golden_model() -> STDiT3:
    """The recorded network. Its residuals converge, so its schedules are not trivial."""
    config = STDiT3Config(
        depth=4, hidden_size=96, num_heads=4, caption_channels=32, model_max_length=12, input_sq_size=512
    )
    return STDiT3.from_safetensors(config, next(GOLDEN.glob("weights_*.safetensors")))


def inputs(videos: int, seed: int = 0, frames: int = 5) -> dict[str, Tensor]:
    """z [V, 4, T, 8, 12] and captions y [2V, 1, 12, 32] with a mask, conditional rows first."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(videos, 12, dtype=torch.long)
    mask[:, 9:] = 0
    return {
        "z": torch.randn(videos, 4, frames, 8, 12, generator=generator),
        "y": torch.randn(2 * videos, 1, 12, 32, generator=generator),
        "mask": mask,
    }


def rows_of(values: dict[str, Tensor], video: int) -> dict[str, Tensor]:
    """One video of a batch of inputs."""
    videos = values["z"].shape[0]
    return {
        "z": values["z"][video : video + 1],
        "y": values["y"][[video, videos + video]],
        "mask": values["mask"][video : video + 1],
    }


@torch.no_grad()
def denoise(
    model: Any, values: dict[str, Tensor], num_steps: int, guidance: float = 4.0, **conditions: Any
) -> Tensor:
    """A plain loop with guidance in one batch."""
    z = values["z"]
    for i in range(num_steps):
        t = torch.full((2 * z.shape[0],), (1 - i / num_steps) * 1000, device=z.device)
        settings = {"fps": 24.0, "height": 64, "width": 96, **conditions}
        out = model(torch.cat((z, z)), t, values["y"], values["mask"], **settings)
        conditional, unconditional = out[:, :4].chunk(2)
        z = z + (unconditional + guidance * (conditional - unconditional)) / num_steps
    return z


@torch.no_grad()
def denoise_slowly(
    model: STDiT3, values: dict[str, Tensor], num_steps: int, codebook: dict[float, int], block: int
) -> tuple[Tensor, list[int], list[tuple[int, float]]]:
    """Reference loop of AdaCache for one video: each residual is cached separately and the distance is
    measured at the temporal attention of one block.

    Returns:
        The latent, the computed steps and (step, relative distance) of every measurement.
    """
    z = values["z"]
    kept: list[Tensor] = []
    computed: list[int] = []
    distances: list[tuple[int, float]] = []
    last, rate = 0, 1
    for step in range(1, num_steps + 1):
        t = torch.full((2,), (1 - (step - 1) / num_steps) * 1000, device=z.device)
        tokens, conditioning = model.embed(torch.cat((z, z)), t, fps=24.0, height=64, width=96)
        if step == last + rate or step in (1, num_steps - 1, num_steps):
            before, residuals = kept, _Recorder()
            conditioning = model.with_captions(conditioning, values["y"], values["mask"])
            for layer, angles in model.stack(conditioning):
                tokens = layer(tokens, conditioning, angles, residuals)
            kept, last = residuals.all, step
            computed.append(step)
            if before:
                # Three residuals per block; a spatial block precedes each temporal block.
                new, old = (some[6 * block + 3].double() for some in (kept, before))
                distances.append((step, float((new - old).abs().sum() / old.abs().sum())))
                score = distances[-1][1] / rate
                rate = next(
                    (r for threshold, r in codebook.items() if score < threshold), [*codebook.values()][-1]
                )
        else:
            for residual in kept:
                tokens = tokens + residual
        conditional, unconditional = model.unembed(tokens, conditioning)[:, :4].chunk(2)
        z = z + (unconditional + 4.0 * (conditional - unconditional)) / num_steps
    return z, computed, distances


class _Recorder:
    """Adds residuals as the plain model does and records them."""

    def __init__(self) -> None:
        self.all: list[Tensor] = []

    def __call__(
        self, part: str, x: Tensor, y: Callable[[], Tensor], gate: Tensor | None, norm: Modulation | None
    ) -> tuple[Tensor, Tensor | None]:
        output = y()
        self.all.append(output if gate is None else gated(output, gate))
        return add_residual(part, x, lambda: output, gate, norm)


def relative_error(a: Tensor, b: Tensor) -> float:
    """mean|a - b| / mean|b|."""
    return float((a - b).abs().mean() / b.abs().mean())


def close(a: float, b: float, tolerance: float) -> bool:
    return math.isclose(a, b, rel_tol=tolerance)

"""FLOPs of STDiT3 per step and per schedule, counted on the meta device: no weights, no memory, no
arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from adacache.models.stdit3 import STDiT3, STDiT3Config

VIDEOS: dict[str, tuple[int, int, int]] = {
    "480p-2s": (51, 480, 854),
    "720p-2s": (51, 720, 1280),
}
"""Frames, height and width in pixels of the published benchmarks."""


@dataclass(frozen=True)
class StepFlops:
    """FLOPs (two per multiply-add of matrix products, convolutions and attention) of one step."""

    computed: int
    """The whole network."""
    reused: int
    """Embedders and final layer, all that runs besides adding the kept residual."""

    def schedule(self, num_steps: int, computed_steps: float) -> float:
        """FLOPs of a schedule that computes some steps and reuses the others."""
        if not 0 <= computed_steps <= num_steps:
            raise ValueError(f"computed_steps: expected 0..{num_steps}, got {computed_steps}")
        return computed_steps * self.computed + (num_steps - computed_steps) * self.reused


def latent_size(frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Latent (T, H, W) of a video under Open-Sora 1.2's autoencoder: 17 frames become 5, 8x8 pixels one."""
    whole, rest = divmod(frames, 17)
    return max(1, 5 * whole + -(-rest // 4)), height // 8, width // 8


def count_flops(
    latent: tuple[int, int, int],
    config: STDiT3Config | None = None,
    *,
    rows: int = 2,
    caption_tokens: int = 300,
) -> StepFlops:
    """Counts one step of STDiT3.

    Args:
        latent: (T, H, W) of the latent.
        config: the network's shape; None: STDiT3-XL/2.
        rows: rows of the batch, 2 for one video with guidance.
        caption_tokens: valid tokens of each caption.
    """
    with torch.device("meta"):
        model = STDiT3(config).eval()
        x = torch.empty(rows, model.config.in_channels, *latent)
        timestep = torch.empty(rows)
        y = torch.empty(rows, 1, caption_tokens, model.config.caption_channels)
    size: dict[str, Any] = {"height": 8.0 * latent[1], "width": 8.0 * latent[2]}
    with torch.no_grad():
        with FlopCounterMode(display=False) as whole:
            model(x, timestep, y, fps=24.0, **size)
        with FlopCounterMode(display=False) as ends:
            model.unembed(*model.embed(x, timestep, fps=24.0, **size))
    return StepFlops(computed=whole.get_total_flops(), reused=ends.get_total_flops())

# SPDX-License-Identifier: Apache-2.0
"""Counts the FLOPs of STDiT3 per step and per schedule on the meta device, without weights or arithmetic."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from adacache.checks import number, refuse, whole
from adacache.models.stdit3 import STDiT3, STDiT3Config

VIDEOS: dict[str, tuple[int, int, int]] = {
    "480p-2s": (51, 480, 854),
    "720p-2s": (51, 720, 1280),
}
"""Frames, height and width in pixels of the published benchmarks."""
LARGEST = 1 << 16


@dataclass(frozen=True)
class StepFlops:
    """FLOPs (two per multiply-add of matrix products, convolutions and attention) of one step."""

    computed: int
    """The whole network."""
    reused: int
    """Embedders and final layer: what still runs besides the addition of the cached residual."""

    def schedule(self, num_steps: int, computed_steps: float) -> float:
        """FLOPs of a schedule that computes some steps (on average) and reuses the others."""
        number(0, whole(1)(num_steps, "num_steps"))(computed_steps, "computed_steps")
        return computed_steps * self.computed + (num_steps - computed_steps) * self.reused


def video_size(name: str) -> tuple[int, int, int]:
    """Frames, height and width of a name in `VIDEOS`, or of "FRAMESxHEIGHTxWIDTH"."""
    if name in VIDEOS:
        return VIDEOS[name]
    if not re.fullmatch("[0-9]{1,6}x[0-9]{1,6}x[0-9]{1,6}", name):
        refuse("video", f"{', '.join(VIDEOS)} or FRAMESxHEIGHTxWIDTH", name)
    frames, height, width = map(int, name.split("x"))
    return frames, height, width


def latent_size(frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Latent (T, H, W) of a video under Open-Sora 1.2's autoencoder: 17 frames become 5, 8x8 pixels one.

    Raises:
        ValueError: frames outside 1..65536, or height or width outside 8..65536.
    """
    groups, rest = divmod(whole(1, LARGEST)(frames, "frames"), 17)
    height, width = (whole(8, LARGEST)(size, name) for size, name in ((height, "height"), (width, "width")))
    return max(1, 5 * groups + -(-rest // 4)), height // 8, width // 8


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

    Raises:
        ValueError: a size is not a whole number of at least 1.
    """
    for name, size in (("rows", rows), ("caption_tokens", caption_tokens), *zip("THW", latent, strict=True)):
        whole(1)(size, name)
    with torch.device("meta"):
        model = STDiT3(config).eval()
        x = torch.empty(rows, model.config.in_channels, *latent)
        timestep = torch.empty(rows)
        y = torch.empty(rows, 1, caption_tokens, model.config.caption_channels)
    pixels: dict[str, Any] = {"height": 8.0 * latent[1], "width": 8.0 * latent[2]}
    with torch.no_grad():
        with FlopCounterMode(display=False) as all_layers:
            model(x, timestep, y, fps=24.0, **pixels)
        with FlopCounterMode(display=False) as ends:
            model.unembed(*model.embed(x, timestep, fps=24.0, **pixels))
    return StepFlops(computed=all_layers.get_total_flops(), reused=ends.get_total_flops())

# SPDX-License-Identifier: Apache-2.0
"""A small text-to-video model of moving handwritten digits; its weights ship with the package."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from adacache.digits.captions import encode, parse
from adacache.models.config import read_config
from adacache.models.rectified_flow import RectifiedFlow
from adacache.models.stdit3 import STDiT3

__all__ = [
    "FPS",
    "FRAMES",
    "GUIDANCE",
    "PATHS",
    "SIZE",
    "WEIGHTS",
    "encode",
    "load",
    "noise",
    "parse",
    "sampler",
    "with_null",
]

FRAMES, SIZE = 16, 32
"""Frames of a clip; height and width of a frame in pixels."""
FPS = 24.0

WEIGHTS = Path(__file__).with_name("digits.safetensors")
"""The shipped weights; digits.json in the same folder states the network's shape."""
PATHS = Path(__file__).with_name("paths.json")
"""Planned paths for 30 steps, as `adacache calibrate digits` writes them."""
GUIDANCE = 2.5
"""Guidance scale of the demo and the evaluation."""


def load(weights: str | Path | None = None) -> STDiT3:
    """The trained digit model in float32, ready to sample.

    It generates clips [V, 1, T = 16, 32, 32] in -1 .. 1 from prompts that `encode` encodes. Call it with
    fps=`FPS`, height=`SIZE`, width=`SIZE`: it works on pixels, without an autoencoder.

    Args:
        weights: a safetensors file and a config of the same name with the suffix .json, as
            `python examples/digits/train.py --export` writes them; None: the shipped `WEIGHTS`.

    Raises:
        FileNotFoundError: there is no such file, or no config.
        ValueError: the config is not valid, or the weights do not fit it.
    """
    weights = WEIGHTS if weights is None else Path(weights)
    config = weights.with_suffix(".json")
    for file in (weights, config):
        if not file.is_file():
            raise FileNotFoundError(f"weights: no file {file}")
    return STDiT3.from_safetensors(read_config(config), weights)


def sampler(num_steps: int = 30) -> RectifiedFlow:
    """The sampler of the demo and the evaluation."""
    return RectifiedFlow(num_steps=num_steps, guidance_scale=GUIDANCE)


def noise(seeds: list[int]) -> Tensor:
    """One clip of standard normal noise per seed, from which sampling starts: [V, 1, 16, 32, 32] float32."""
    sources = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randn(1, FRAMES, SIZE, SIZE, generator=source) for source in sources])


def with_null(model: STDiT3, y: Tensor) -> Tensor:
    """Captions [V, 1, L, C] followed by V unconditional ones, for guidance: [2V, 1, L, C]."""
    return torch.cat((y, model.null_captions(y.shape[0])))

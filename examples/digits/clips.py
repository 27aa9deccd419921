# SPDX-License-Identifier: Apache-2.0
"""Draws training clips from prompts: a handwritten digit that rests or moves over a dark background.

The digits are scikit-learn's `load_digits` (8x8 scans of handwriting). Positions are in pixels, x to the
right and y down; speeds in pixels per frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from adacache.digits import FRAMES, SIZE
from adacache.digits.captions import DIRECTIONS, Prompt
from torch import Tensor

BOX = 14.0
"""Height and width in pixels of a drawn digit."""
SPEEDS = {"resting": 0.0, "drifting": 0.5, "racing": 1.1}
"""Pixels per frame, before jitter."""
JITTER = 0.05
"""The speed of a clip is that in `SPEEDS` times a random factor in 1 - JITTER .. 1 + JITTER."""
WANDER = 1.5
"""Largest offset in pixels of a path from the centre of the frame, in x and in y."""
HEADINGS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
"""Unit vectors (x, y)."""
TEST_SHARE = 5
"""One digit image in five is held out for testing."""


@dataclass(frozen=True)
class Clips:
    """V clips and their parameters."""

    video: Tensor
    """[V, 1, T = 16, 32, 32] float32 in -1 .. 1."""
    digit: Tensor
    """[V] int64."""
    position: Tensor
    """[V, T, 2] float32: (x, y) of the centre of the digit's box in each frame."""
    velocity: Tensor
    """[V, 2] float32: (x, y) in pixels per frame."""


@cache
def digit_images(split: str = "train") -> tuple[Tensor, Tensor]:
    """Handwritten digits: images [n, 8, 8] float32 in 0 .. 1 and labels [n] int64.

    Args:
        split: "train" or "test"; every fifth image of a label is a test image.

    Raises:
        ValueError: another split.
        ImportError: scikit-learn is not installed.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split: expected 'train' or 'test', got {split!r}")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "scikit-learn, which holds the digits, is missing; pip install scikit-learn"
        ) from error
    data = load_digits()
    images, labels = torch.from_numpy(data.images).float() / 16, torch.from_numpy(data.target).long()
    place_in_label = F.one_hot(labels).cumsum(0).gather(1, labels[:, None])[:, 0]
    chosen = (place_in_label % TEST_SHARE == 0) == (split == "test")
    return images[chosen], labels[chosen]


def draw_clips(prompts: Sequence[Prompt], generator: torch.Generator, split: str = "train") -> Clips:
    """One random clip for each prompt; the digit's box stays within the frame.

    Args:
        prompts: V prompts. The direction of a resting digit has no effect.
        generator: source of all randomness: handwriting, position, jitter of the speed, background.
        split: handwriting, see `digit_images`.
    """
    count = len(prompts)
    digit = torch.tensor([prompt.digit for prompt in prompts])

    image = choose_images(digit, generator, split)
    speed = torch.tensor([SPEEDS[prompt.motion] for prompt in prompts])
    speed = speed * (1 + JITTER * (2 * torch.rand(count, generator=generator) - 1))
    velocity = speed[:, None] * torch.tensor([HEADINGS[prompt.direction] for prompt in prompts])

    travel = velocity * (FRAMES - 1)
    lowest, highest = BOX / 2 - travel.clamp(max=0), SIZE - BOX / 2 - travel.clamp(min=0)
    centred = SIZE / 2 - travel / 2 + WANDER * (2 * torch.rand(count, 2, generator=generator) - 1)
    start = centred.clamp(lowest, highest)
    position = start[:, None] + velocity[:, None] * torch.arange(FRAMES)[:, None]

    ink = draw_digits(image, position)
    ground = draw_backgrounds([prompt.background for prompt in prompts], generator)[:, None]
    return Clips((ground + (1 - ground) * ink)[:, None], digit, position, velocity)


def choose_images(digit: Tensor, generator: torch.Generator, split: str = "train") -> Tensor:
    """A random handwriting [V, 8, 8] of each of the digits [V]; see `digit_images`."""
    images, labels = digit_images(split)
    of_digit = labels == digit[:, None]
    choice = (torch.rand(len(digit), generator=generator) * of_digit.sum(1)).long()
    return images[(of_digit.cumsum(1) > choice[:, None]).int().argmax(1)]


def draw_digits(image: Tensor, position: Tensor, box: float = BOX) -> Tensor:
    """Digits at sub-pixel positions: [V, T, 32, 32] float32 in 0 .. 1, where 1 is ink.

    Args:
        image: [V, 8, 8] in 0 .. 1.
        position: [V, T, 2], (x, y) of the centre of the digit's box.
        box: height and width of a digit in pixels.
    """
    cells = image.shape[-1]
    pixels = torch.arange(SIZE) + 0.5
    # Distance of each pixel from each cell's centre, in cells: [V, T, 2, 32, 8].
    at = (pixels - position[..., None]) * (cells / box) + cells / 2
    weights = _catmull_rom(at[..., None] - (torch.arange(cells) + 0.5))
    return (weights[:, :, 1] @ image[:, None] @ weights[:, :, 0].mT).clamp(0, 1)


def draw_backgrounds(kinds: Sequence[str], generator: torch.Generator) -> Tensor:
    """Dark backgrounds [V, 32, 32] float32, the same in each frame of a clip.

    plain: one level in -0.9 .. -0.7. striped: vertical waves of period 6 .. 10 pixels. noisy: random grain of
    2 pixels. striped and noisy have mean -0.65.
    """
    count = len(kinds)
    plain = (-0.9 + 0.2 * torch.rand(count, 1, 1, generator=generator)).expand(-1, SIZE, SIZE)
    period = 6 + 4 * torch.rand(count, 1, 1, generator=generator)
    turns = torch.rand(count, 1, 1, generator=generator) + torch.arange(SIZE) / period
    striped = (-0.65 + 0.2 * torch.sin(2 * torch.pi * turns)).expand(-1, SIZE, SIZE)
    grain = torch.randn(count, 1, SIZE // 2, SIZE // 2, generator=generator)
    noisy = -0.65 + 0.15 * F.interpolate(grain, scale_factor=2, mode="bilinear", align_corners=False)[:, 0]
    of_kind = {"plain": plain, "striped": striped, "noisy": noisy.clamp(-1, 0)}
    return torch.stack([of_kind[kind][row] for row, kind in enumerate(kinds)])


def _catmull_rom(distance: Tensor) -> Tensor:
    """The interpolating cubic with slope -1/2 (Catmull and Rom 1974), zero from distance 2 on."""
    d = distance.abs()
    near = (1.5 * d - 2.5) * d * d + 1
    far = ((2.5 - 0.5 * d) * d - 4) * d + 2
    return torch.where(d < 1, near, torch.where(d < 2, far, torch.zeros_like(d)))


assert set(HEADINGS) == set(DIRECTIONS)

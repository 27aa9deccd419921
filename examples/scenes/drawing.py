# SPDX-License-Identifier: Apache-2.0
"""Draws the training clips: one or two handwritten digits that move over a ground, seen by a simple camera.

Positions are in pixels, x to the right and y down; speeds in pixels per frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from clips import HEADINGS, choose_images, draw_digits
from torch import Tensor

from scenes.captions import Prompt

FRAMES, SIZE = 16, 32
"""Frames of a clip; height and width of a frame in pixels."""
BOX = 12.0
"""Height and width in pixels of a drawn digit."""
SPEEDS = {"still": 0.0, "drifting": 0.35, "walking": 0.75, "racing": 1.25}
"""Pixels per frame, before jitter. A second digit moves in the opposite direction."""
JITTER = 0.05
"""The speed of a clip is that in `SPEEDS` times a random factor in 1 - JITTER .. 1 + JITTER."""
WANDER = 1.5
"""Largest offset in pixels of a path from its middle position, in x and in y."""
LANES = {"one": (0.0,), "two": (-7.0, 7.0)}
"""Offset of each digit from the frame's centre, across the direction of its motion."""
CUT = FRAMES // 2
"""First frame of the second scene of a `cut` clip."""
BAR_WIDTH, BAR_LEVEL = 4, -0.15
SHAPES = 22
"""Rectangles of a crowded ground of `CANVAS` x `CANVAS` pixels."""
CANVAS = SIZE + FRAMES


@dataclass(frozen=True)
class Scenes:
    """V clips and their parameters."""

    video: Tensor
    """[V, 1, T = 16, 32, 32] float32 in -1 .. 1."""
    digit: Tensor
    """[V] int64."""
    position: Tensor
    """[V, 2, T, 2] float32: (x, y) of the centre of each digit's box; NaN where there is no second digit."""
    velocity: Tensor
    """[V, 2] float32 of the first digit: (x, y) in pixels per frame."""


def draw_scenes(prompts: Sequence[Prompt], generator: torch.Generator, split: str = "train") -> Scenes:
    """One random clip for each prompt; the digits' boxes stay within the frame.

    - steady: the ground rests.
    - panning: the ground moves by 1 pixel per frame against the direction of the prompt.
    - barred: a bar across the direction hides part of the digits' path.
    - cut: from frame `CUT` on another scene of the same prompt follows.

    Args:
        prompts: V prompts. The direction of still digits has an effect only if the camera pans.
        generator: source of all randomness.
        split: handwriting, see `clips.digit_images`.
    """
    count = len(prompts)
    digit = torch.tensor([prompt.digit for prompt in prompts])
    heading = torch.tensor([HEADINGS[prompt.direction] for prompt in prompts])
    speed = torch.tensor([SPEEDS[prompt.motion] for prompt in prompts])
    speed = speed * (1 + JITTER * (2 * torch.rand(count, generator=generator) - 1))
    velocity = speed[:, None] * heading
    is_cut = torch.tensor([prompt.view == "cut" for prompt in prompts])
    panning = torch.tensor([prompt.view == "panning" for prompt in prompts])
    pan = (heading * panning[:, None]).long()

    scenes = []
    for _ in range(2):
        ground = _moved(draw_grounds([prompt.ground for prompt in prompts], generator), pan)
        inks, positions = [], []
        for lane in range(2):
            offset = torch.tensor([(*LANES[prompt.count], float("nan"))[lane] for prompt in prompts])
            position = _path(velocity * (1, -1)[lane], heading, offset, is_cut, generator)
            image = choose_images(digit, generator, split)
            inks.append(draw_digits(image, position, BOX).nan_to_num(0.0))
            positions.append(position)
        ink = torch.maximum(*inks)
        scenes.append((ground + (1 - ground) * ink, torch.stack(positions, 1)))
    second = is_cut[:, None] & (torch.arange(FRAMES) >= CUT)
    video = torch.where(second[..., None, None], scenes[1][0].roll(CUT, 1), scenes[0][0])
    position = torch.where(second[:, None, :, None], scenes[1][1].roll(CUT, 2), scenes[0][1])
    return Scenes(_barred(video, prompts, heading, generator)[:, None], digit, position, velocity)


def draw_grounds(kinds: Sequence[str], generator: torch.Generator) -> Tensor:
    """Dark grounds [V, CANVAS, CANVAS] float32.

    plain: one level. striped: diagonal waves of period 6 .. 9 pixels. crowded: overlapping rectangles of
    random levels and sizes.
    """
    count = len(kinds)

    def random(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator)

    plain = (-0.9 + 0.3 * random(1, 1)).expand(-1, CANVAS, CANVAS)
    at = torch.arange(CANVAS)
    slope = torch.where(random(1, 1) < 0.5, -1, 1)
    waves = (at[:, None] + slope * at) / (2**0.5 * (6 + 3 * random(1, 1)))
    striped = -0.65 + 0.25 * torch.sin(2 * torch.pi * (waves + random(1, 1)))
    crowded = plain.clone()
    middle, half = CANVAS * random(SHAPES, 2), 2 + 4 * random(SHAPES, 2)
    level = -0.95 + 0.7 * random(SHAPES)
    inside = (at[:, None] + 0.5 - middle[:, :, None]).abs() < half[:, :, None]
    for shape in range(SHAPES):
        covered = inside[:, shape, :, 0, None] & inside[:, shape, None, :, 1]
        crowded = torch.where(covered, level[:, shape, None, None], crowded)
    of_kind = {"plain": plain, "striped": striped, "crowded": crowded}
    return torch.stack([of_kind[kind][row] for row, kind in enumerate(kinds)])


def _path(
    velocity: Tensor, heading: Tensor, offset: Tensor, is_cut: Tensor, generator: torch.Generator
) -> Tensor:
    """Straight paths [V, T, 2], centred in the frame along `heading` and `offset` from its centre across."""
    frames = torch.where(is_cut, CUT, FRAMES)[:, None]
    travel = velocity * (frames - 1)
    across = heading.flip(1).abs() * offset[:, None]
    wander = WANDER * (2 * torch.rand(len(offset), 2, generator=generator) - 1)
    middle = SIZE / 2 + across + wander
    room = SIZE / 2 - BOX / 2 - travel.abs() / 2
    middle = SIZE / 2 + (middle - SIZE / 2).clamp(-room, room)
    return (middle - travel / 2)[:, None] + velocity[:, None] * torch.arange(FRAMES)[:, None]


def _moved(ground: Tensor, pan: Tensor) -> Tensor:
    """Grounds [V, T, 32, 32] seen through a window that moves by `pan` [V, 2], (x, y) in pixels per frame."""
    start = torch.where(pan < 0, FRAMES - 1, 0)
    corner = start[:, None] + pan[:, None] * torch.arange(FRAMES)[:, None]
    rows = corner[..., 1, None] + torch.arange(SIZE)
    columns = corner[..., 0, None] + torch.arange(SIZE)
    clip = torch.arange(len(ground))[:, None, None, None]
    return ground[clip, rows[..., None], columns[:, :, None]]


def _barred(video: Tensor, prompts: Sequence[Prompt], heading: Tensor, generator: torch.Generator) -> Tensor:
    at = torch.arange(SIZE) + 0.5
    middle = SIZE / 4 + SIZE / 2 * torch.rand(len(prompts), 1, generator=generator)
    hidden = (at - middle).abs() < BAR_WIDTH / 2
    sideways = heading[:, :1] != 0
    barred = torch.tensor([prompt.view == "barred" for prompt in prompts])[:, None]
    columns, rows = hidden & sideways & barred, hidden & ~sideways & barred
    return torch.where((columns[:, None] | rows[:, :, None])[:, None], BAR_LEVEL, video)

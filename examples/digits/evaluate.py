# SPDX-License-Identifier: Apache-2.0
"""Measures how well the digit model follows its prompts: `python examples/digits/evaluate.py`.

Generates one clip for each of the 96 held-out prompts and reads digit, speed and direction from the pixels:
the digit with a classifier trained on real digits, the motion by tracking the ink. Real clips of held-out
handwriting, read in the same way, give the upper bound.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from adacache.commands.options import output_file, real_number, whole_number
from adacache.digits import FPS, GUIDANCE, SIZE, encode, load, noise, with_null
from adacache.digits.captions import Prompt, all_prompts, held_out_prompts
from adacache.files import write_json
from adacache.models.rectified_flow import RectifiedFlow
from adacache.models.stdit3 import STDiT3
from clips import HEADINGS, SPEEDS, draw_clips
from torch import Tensor

CROP = 16
"""Width in pixels of the window in which a digit is classified."""
DARK = -0.1
"""Background is below this level, ink above."""


@dataclass(frozen=True)
class Report:
    """How well clips follow their prompts."""

    clips: int
    digit_accuracy: float
    """Share of clips whose classified digit is that of the prompt."""
    speed_correlation: float
    """Pearson correlation of the measured speed with that of the prompt (without jitter)."""
    direction_accuracy: float
    """Share of the moving clips with the direction of the prompt."""
    measured_speed: dict[str, float]
    """Mean measured speed of each motion class, pixels per frame."""

    def __str__(self) -> str:
        speeds = ", ".join(f"{motion} {speed:.2f}" for motion, speed in self.measured_speed.items())
        return (
            f"digit {self.digit_accuracy:6.1%} | speed correlation {self.speed_correlation:.3f} | "
            f"direction {self.direction_accuracy:6.1%} | pixels per frame: {speeds}"
        )


class Reader:
    """Reads digits and motion from clips.

    The classifier is a support vector machine on the digit averaged over the frames, centred on its track. It
    is trained on real digits in a few seconds.
    """

    def __init__(self, per_prompt: int = 10, seed: int = 1):
        from sklearn.svm import SVC

        clips = draw_clips(all_prompts() * per_prompt, torch.Generator().manual_seed(seed))
        self.classifier = SVC(C=10.0).fit(_features(clips.video), clips.digit.numpy())

    def digits(self, video: Tensor) -> Tensor:
        """The classified digit of each clip of video [V, 1, T, 32, 32]: [V] int64."""
        return torch.from_numpy(self.classifier.predict(_features(video)))

    def report(self, video: Tensor, prompts: Sequence[Prompt]) -> Report:
        """Compares V clips [V, 1, T, 32, 32] with their prompts."""
        wanted = torch.tensor([prompt.digit for prompt in prompts])
        velocity = velocities(video)
        speed = velocity.norm(dim=1)
        wanted_speed = torch.tensor([SPEEDS[prompt.motion] for prompt in prompts])
        heading = (velocity @ torch.tensor(list(HEADINGS.values())).T).argmax(1)
        wanted_heading = torch.tensor([list(HEADINGS).index(prompt.direction) for prompt in prompts])
        moving = wanted_speed > 0
        return Report(
            clips=len(prompts),
            digit_accuracy=_share(self.digits(video) == wanted),
            speed_correlation=float(np.corrcoef(speed.numpy(), wanted_speed.numpy())[0, 1]),
            direction_accuracy=_share((heading == wanted_heading)[moving]),
            measured_speed={
                word: float(speed[wanted_speed == value].mean()) for word, value in SPEEDS.items()
            },
        )


def track(video: Tensor) -> Tensor:
    """Centre of mass of the ink in each frame of video [V, 1, T, H, W]: [V, T, 2], (x, y) in pixels.

    The middle of the frame where there is no ink.
    """
    ink = (video[:, 0] - DARK).clamp(min=0)
    height, width = ink.shape[2:]
    total = ink.sum((2, 3))
    x = (ink.sum(2) @ (torch.arange(width) + 0.5)) / total
    y = (ink.sum(3) @ (torch.arange(height) + 0.5)) / total
    middle = torch.tensor([width / 2, height / 2])
    return torch.where((total > 0)[..., None], torch.stack((x, y), dim=2), middle)


def velocities(video: Tensor) -> Tensor:
    """Velocity of the ink in each clip of video [V, 1, T, H, W]: least squares over its track.

    Returns:
        [V, 2], (x, y) in pixels per frame.
    """
    time_of = torch.arange(video.shape[2]) - (video.shape[2] - 1) / 2
    return torch.einsum("vtc,t->vc", track(video), time_of) / time_of.square().sum()


@torch.no_grad()
def make_clips(
    model: STDiT3, prompts: Sequence[Prompt], seeds: Sequence[int], flow: RectifiedFlow, batch: int = 16
) -> Tensor:
    """One clip per prompt and seed: [V, 1, 16, 32, 32] float32 in -1 .. 1."""
    made = []
    for first in range(0, len(prompts), batch):
        y = encode(prompts[first : first + batch])
        z = noise(list(seeds[first : first + batch]))
        made.append(flow.sample(model, z, with_null(model, y), fps=FPS, height=SIZE, width=SIZE))
    return torch.cat(made).clamp(-1, 1)


def evaluate(model: STDiT3, flow: RectifiedFlow, seed: int = 0) -> dict[str, Report]:
    """Reports on generated clips of the held-out prompts, seeds `seed` .. `seed` + 95, and on real ones."""
    prompts, reader = held_out_prompts(), Reader()
    real = draw_clips(prompts * 5, torch.Generator().manual_seed(seed + 2), split="test").video
    made = make_clips(model, prompts, range(seed, seed + len(prompts)), flow)
    return {"generated": reader.report(made, prompts), "real": reader.report(real, prompts * 5)}


def _features(video: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The ink of each clip, averaged over its frames after centring: [V, CROP * CROP]."""
    frames, height, width = video.shape[2:]
    centre = track(video).flatten(0, 1)
    offset = torch.arange(CROP) - (CROP - 1) / 2
    # grid_sample: -1 .. 1 spans the frame from edge to edge.
    x = (centre[:, 0, None] + offset) / width * 2 - 1
    y = (centre[:, 1, None] + offset) / height * 2 - 1
    grid = torch.stack((x[:, None].expand(-1, CROP, -1), y[:, :, None].expand(-1, -1, CROP)), dim=3)
    ink = (video[:, 0] - DARK).clamp(min=0).flatten(0, 1)[:, None]
    crops = F.grid_sample(ink, grid, align_corners=False)
    mean = crops.reshape(-1, frames, CROP * CROP).mean(1)
    return cast("np.ndarray[Any, np.dtype[np.float32]]", mean.numpy())


def _share(right: Tensor) -> float:
    return float(right.float().mean())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python examples/digits/evaluate.py", description=__doc__.partition(":")[0]
    )
    parser.add_argument("--weights", type=Path, help="exported weights (default: the shipped ones)")
    parser.add_argument("--json", type=output_file, help="also write the results to this file")
    parser.add_argument(
        "--steps", type=whole_number(1), default=30, help="denoising steps (default: %(default)s)"
    )
    parser.add_argument(
        "--guidance", type=real_number(), default=GUIDANCE, help="guidance scale (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=whole_number(0), default=0, help="first seed of the clips (default: %(default)s)"
    )
    given = parser.parse_args(arguments)
    try:
        model = load(given.weights)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    began = time.perf_counter()
    flow = RectifiedFlow(num_steps=given.steps, guidance_scale=given.guidance)
    reports = evaluate(model, flow, given.seed)
    seconds = time.perf_counter() - began
    print(f"{flow.num_steps} steps, guidance {flow.guidance_scale:g}, {seconds:.0f} s")
    for name, report in reports.items():
        print(f"{name:>9} ({report.clips:3d} clips): {report}")
    if given.json is not None:
        figures: dict[str, Any] = {name: asdict(report) for name, report in reports.items()}
        figures |= {"steps": given.steps, "guidance": given.guidance, "seed": given.seed}
        write_json(given.json, figures)


if __name__ == "__main__":
    main()

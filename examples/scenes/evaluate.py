# SPDX-License-Identifier: Apache-2.0
"""Measures how well clips follow their prompts: `python examples/scenes/evaluate.py --model wan`.

Generates clips of held-out prompts through the diffusers pipelines and reads digit, speed and direction from
the pixels. Real clips of held-out handwriting, read in the same way, give the upper bound.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "digits")]

import numpy as np
import torch
import torch.nn.functional as F
from adacache.commands.options import output_file, whole_number
from adacache.files import write_json
from clips import HEADINGS
from torch import Tensor

from scenes.captions import Prompt, all_prompts, evaluation_prompts
from scenes.drawing import CUT, SIZE, SPEEDS, draw_scenes

CROP = 14
"""Width in pixels of the window in which a digit is classified."""
DARK = -0.1
"""Grounds and bars are below this level, most ink is above."""


@dataclass(frozen=True)
class Report:
    """How well clips follow their prompts. Each digit of each scene of a clip counts."""

    clips: int
    digit_accuracy: float
    """Share of the digits whose class is that of the prompt; digits that rest behind a bar are left out."""
    speed_correlation: float
    """Pearson correlation of the measured speed with that of the prompt (without jitter)."""
    direction_accuracy: float
    """Share of the walking and racing digits with the direction of the prompt."""
    measured_speed: dict[str, float]
    """Mean measured speed along the direction of each motion class, pixels per frame."""

    def __str__(self) -> str:
        speeds = ", ".join(f"{motion} {speed:.2f}" for motion, speed in self.measured_speed.items())
        return (
            f"digit {self.digit_accuracy:6.1%} | speed correlation {self.speed_correlation:.3f} | "
            f"direction {self.direction_accuracy:6.1%} | pixels per frame: {speeds}"
        )


@dataclass(frozen=True)
class Part:
    """One digit in one scene of a clip."""

    prompt: Prompt
    ink: Tensor
    """[T, 32, 32]: what is brighter than `DARK`, in the half of the frame where the digit moves."""
    heading: Tensor
    """Unit vector (x, y) of the motion."""

    @property
    def visible(self) -> bool:
        return self.prompt.motion != "still" or self.prompt.view != "barred"


class Reader:
    """Reads digits and motion from clips.

    The classifier is a support vector machine on the digit averaged over the frames, centred on its track. It
    is trained on real scenes in some seconds.
    """

    def __init__(self, prompts: Sequence[Prompt] | None = None, seed: int = 1):
        from sklearn.svm import SVC

        prompts = all_prompts()[::5] if prompts is None else prompts
        generator = torch.Generator().manual_seed(seed)
        parts = [part for part in split(draw_scenes(prompts, generator).video, prompts) if part.visible]
        wanted = [part.prompt.digit for part in parts]
        self.classifier = SVC(C=10.0).fit(np.stack([_features(part.ink) for part in parts]), wanted)

    def report(self, video: Tensor, prompts: Sequence[Prompt]) -> Report:
        """Compares V clips [V, 1, T, 32, 32] with their prompts."""
        parts = split(video, prompts)
        visible = [part for part in parts if part.visible]
        read = self.classifier.predict(np.stack([_features(part.ink) for part in visible]))
        right = read == np.array([part.prompt.digit for part in visible])
        velocity = torch.stack([_velocity(part.ink) for part in parts])
        heading = torch.stack([part.heading for part in parts])
        along = (velocity * heading).sum(1)
        wanted_speed = torch.tensor([SPEEDS[part.prompt.motion] for part in parts])
        directions = torch.tensor(list(HEADINGS.values()))
        same = (velocity @ directions.T).argmax(1) == (heading @ directions.T).argmax(1)
        return Report(
            clips=len(prompts),
            digit_accuracy=float(right.mean()),
            speed_correlation=float(np.corrcoef(along.numpy(), wanted_speed.numpy())[0, 1]),
            direction_accuracy=float(same[wanted_speed > 0.5].float().mean()),
            measured_speed={
                word: float(along[wanted_speed == value].mean()) for word, value in SPEEDS.items()
            },
        )


def split(video: Tensor, prompts: Sequence[Prompt]) -> list[Part]:
    """The digits of clips [V, 1, T, 32, 32]: each half of the frame for two digits, each scene for a cut."""
    parts = []
    for clip, prompt in zip(video[:, 0], prompts, strict=True):
        ink = (clip - DARK).clamp(min=0)
        heading = torch.tensor(HEADINGS[prompt.direction])
        scenes = (ink[:CUT], ink[CUT:]) if prompt.view == "cut" else (ink,)
        for scene in scenes:
            if prompt.count == "one":
                parts.append(Part(prompt, scene, heading))
                continue
            first = torch.arange(SIZE) < SIZE // 2
            first = first[:, None] if heading[0] != 0 else first[None]
            parts.append(Part(prompt, scene * first, heading))
            parts.append(Part(prompt, scene * ~first, -heading))
    return parts


def generate(
    name: str, solver: str, prompts: Sequence[Prompt], seeds: Sequence[int], batch: int = 16
) -> Tensor:
    """One clip of a pipeline per prompt and seed: [V, 1, 16, 32, 32] float32 in -1 .. 1."""
    from scenes.models import call_arguments, latte_pipeline, wan_pipeline

    pipe: Any = wan_pipeline(solver) if name == "wan" else latte_pipeline()
    made = []
    for first in range(0, len(prompts), batch):
        chosen = slice(first, first + batch)
        made.append(pipe(**call_arguments(pipe, prompts[chosen], seeds[chosen])).frames)
    return torch.cat(made).clamp(-1, 1)


def save_sheet(video: Tensor, path: Path, every: int = 2, scale: int = 3) -> None:
    """Writes an image with a row for each clip of video [V, 1, T, 32, 32]: every second frame."""
    from PIL import Image

    frames = F.pad((video[:, 0, ::every].clamp(-1, 1) + 1) * 127.5, (1, 1, 1, 1), value=255.0)
    sheet = frames.permute(0, 2, 1, 3).flatten(0, 1).flatten(1).byte().numpy()
    Image.fromarray(sheet).resize((sheet.shape[1] * scale, sheet.shape[0] * scale), 0).save(path)


def _track(ink: Tensor) -> tuple[Tensor, Tensor]:
    """Centre of mass (x, y) of the ink [T, 32, 32] in each frame [T, 2], and its mass [T]."""
    mass = ink.sum((1, 2))
    at = torch.arange(SIZE) + 0.5
    centre = torch.stack((ink.sum(1) @ at, ink.sum(2) @ at), 1) / mass.clamp(min=1e-6)[:, None]
    return torch.where(mass[:, None] > 1e-3, centre, SIZE / 2), mass


def _velocity(ink: Tensor) -> Tensor:
    """Velocity (x, y) in pixels per frame: least squares over the track, a frame weighted with its ink."""
    centre, mass = _track(ink)
    weight = mass / mass.sum().clamp(min=1e-6)
    frame = torch.arange(len(ink), dtype=torch.float32)
    frame = frame - (weight * frame).sum()
    return (weight * frame) @ centre / (weight * frame.square()).sum().clamp(min=1e-6)


def _features(ink: Tensor) -> Any:
    """The ink averaged over the frames after centring: [CROP * CROP]."""
    centre, _ = _track(ink)
    offset = torch.arange(CROP) - (CROP - 1) / 2
    # grid_sample: -1 .. 1 spans the frame from edge to edge.
    at = (centre[:, :, None] + offset) / SIZE * 2 - 1
    grid = torch.stack((at[:, 0, None].expand(-1, CROP, -1), at[:, 1, :, None].expand(-1, -1, CROP)), 3)
    crops = F.grid_sample(ink[:, None], grid, align_corners=False)
    return crops.mean((0, 1)).flatten().numpy()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python examples/scenes/evaluate.py", description=__doc__.partition(":")[0]
    )
    parser.add_argument("--model", choices=("wan", "latte"), help="default: both")
    parser.add_argument(
        "--per-class",
        type=whole_number(1),
        default=4,
        help="prompts of each of the 12 pairs of a motion and a ground (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=whole_number(0), default=0, help="first seed of the clips (default: %(default)s)"
    )
    parser.add_argument("--json", type=output_file, help="also write the results to this file")
    parser.add_argument("--sheet", type=Path, metavar="DIR", help="write images of the clips to this folder")
    given = parser.parse_args(arguments)
    prompts, reader = evaluation_prompts(given.per_class), Reader()
    real = prompts * 5
    generator = torch.Generator().manual_seed(given.seed + 2)
    reports = {"real": reader.report(draw_scenes(real, generator, split="test").video, real)}
    print(f"real: {reports['real']}", flush=True)
    for name, solver in (("wan", "unipc"), ("wan", "euler"), ("latte", "ddim")):
        if given.model in (None, name):
            began = time.perf_counter()
            video = generate(name, solver, prompts, range(given.seed, given.seed + len(prompts)))
            reports[f"{name} {solver}"] = report = reader.report(video, prompts)
            print(f"{name} {solver} ({time.perf_counter() - began:.0f} s): {report}", flush=True)
            if given.sheet is not None:
                given.sheet.mkdir(parents=True, exist_ok=True)
                save_sheet(video, given.sheet / f"{name}_{solver}.png")
    if given.json is not None:
        write_json(given.json, {name: asdict(report) for name, report in reports.items()})


if __name__ == "__main__":
    main()

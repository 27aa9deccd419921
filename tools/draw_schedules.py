# SPDX-License-Identifier: Apache-2.0
"""Plots schedules of the digit model to docs/images/schedules.png: `python tools/draw_schedules.py`."""

from __future__ import annotations

from pathlib import Path

import adacache
import torch
from adacache.digits import FPS, SIZE, encode, load, noise, parse, sampler, with_null
from adacache.plots import draw_traces

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "schedules.png"
CLIPS = {
    "resting digit": "a 6 resting right over a plain background",
    "drifting digit": "a 5 drifting right over a noisy background",
    "racing digit": "a 3 racing left over a noisy background",
}


def main() -> None:
    model, flow = load().requires_grad_(False), sampler(30)
    handle = adacache.enable(model, "digits/fast+moreg", num_steps=30)
    traces = {}
    for label, prompt in CLIPS.items():
        captions = with_null(model, encode([parse(prompt)]))
        flow.sample(model, noise([0]), captions, fps=FPS, height=SIZE, width=SIZE)
        traces[label] = (handle.trace, 0)
    draw_traces(traces, PICTURE, "computed steps of 30, AdaCache with motion regularization")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

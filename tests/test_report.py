# SPDX-License-Identifier: Apache-2.0
"""The report of a comparison: tables, findings, and a self-contained HTML file."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from adacache.commands.report import (
    Clip,
    Study,
    gif,
    method_table,
    motion_finding,
    motion_table,
    write_report,
    write_results,
)
from adacache.plots import draw_traces
from adacache.trace import Trace
from PIL import Image

STEPS = 6


class Tags(HTMLParser):
    """Checks the nesting of tags and collects image sources."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        if tag == "img":
            self.images.append(dict(attrs)["src"] or "")
        if tag not in ("img", "br", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def trace(computed: list[int], factor: float = 1.0) -> Trace:
    measured = [
        {
            "step": step,
            "site": "temporal_blocks.1.temporal_attention",
            "distance": [0.1],
            "motion": [0.2],
            "factor": [factor],
            "rate": [2],
            "nonfinite": [False],
        }
        for step in computed[1:]
    ]
    return Trace(
        num_steps=STEPS,
        num_videos=1,
        policy={},
        computed=[[step in computed] for step in range(1, STEPS + 1)],
        timesteps=[None] * STEPS,
        measurements=measured,
        cache_bytes=2048,
    )


def clip(
    prompt: str, motion: str, method: str, seconds: float, computed: list[int] | None, psnr: float
) -> Clip:
    video = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(len(prompt)))
    if computed is None:
        return Clip(prompt, motion, 0, method, video, seconds, STEPS)
    return Clip(
        prompt,
        motion,
        0,
        method,
        video,
        seconds,
        len(computed),
        psnr,
        0.9,
        trace(computed, 1.0 + ("M" in method)),
    )


@pytest.fixture
def study() -> Study:
    study = Study(
        "none", ["none", "fast", "fast + M"], STEPS, 8192, {"threads": "<two>"}, {"fast": "codebook"}
    )
    for prompt, motion, few, many in (
        ("still", "resting", [1, 2, 5, 6], [1, 5, 6]),
        ("quick", "racing", [1, 2, 5, 6], [1, 2, 3, 5, 6]),
    ):
        study.clips.append(clip(prompt, motion, "none", 3.0, None, 0.0))
        study.clips.append(clip(prompt, motion, "fast", 1.5, few, 30.0))
        study.clips.append(clip(prompt, motion, "fast + M", 1.0, many, 32.0 if motion == "racing" else 29.0))
    return study


def test_method_table(study: Study) -> None:
    header, rows = method_table(study)
    assert all(len(row) == len(header) for row in rows)
    assert rows[0][:4] == ["none", "6.0 of 6", "3.000", "1.00x"]
    assert rows[1] == ["fast", "4.0 of 6", "1.500", "2.00x", "30.00", "0.9000", "2", "8"]
    assert rows[2][:5] == ["fast + M", "4.0 of 6", "1.000", "3.00x", "30.50"]


def test_motion_table(study: Study) -> None:
    header, rows = motion_table(study)
    assert header == ["method", "resting: steps", "resting: dB", "racing: steps", "racing: dB"]
    assert rows == [["fast", "4.0", "30.00", "4.0", "30.00"], ["fast + M", "3.0", "29.00", "5.0", "32.00"]]


def test_finding_matches_the_results(study: Study) -> None:
    moved = motion_finding(study, "fast", "fast + M")
    assert moved.startswith("fast + M moved computed steps to the clips with motion")
    assert "resting -1.0, racing +1.0" in moved
    assert motion_finding(study, "fast + M", "fast").startswith("fast moved computed steps away")
    assert motion_finding(study, "fast", "fast").startswith("fast did not move computed steps")


def test_equal_clips_have_infinite_psnr(study: Study, tmp_path: Path) -> None:
    study.clips[:] = [c if c.psnr is None else replace(c, psnr=math.inf) for c in study.clips]
    assert method_table(study)[1][1][4] == "same"
    write_results(study, tmp_path / "results.json")
    json.loads((tmp_path / "results.json").read_text(), parse_constant=lambda name: pytest.fail(name))


def test_report_is_self_contained(study: Study, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(study, path, ["a < b & c"])
    text = path.read_text()
    tags = Tags()
    tags.feed(text)
    tags.close()
    assert tags.open == []
    assert not tags.seen & {"script", "link", "iframe"}
    assert "a &lt; b &amp; c" in text
    assert "&lt;two&gt;" in text
    assert not re.search(r"(src|href)=.?(?!.?data:)https?:", text)

    kinds = [image.split(";")[0] for image in tags.images]
    assert kinds.count("data:image/gif") == len(study.takes)
    assert kinds.count("data:image/svg+xml") == 2
    for image in tags.images:
        data = base64.b64decode(image.split(",", 1)[1], validate=True)
        assert b"</svg>" in data or Image.open(io.BytesIO(data)).size == (3 * 32 + 2 * 12, 32)


def test_text_is_data(study: Study, tmp_path: Path) -> None:
    """Prompts and titles are not parsed as math in plots or as placeholders in pages."""
    prompt = "$5 {body} $x_{$ \\frac"
    study.clips[:] = [replace(c, prompt=prompt) if c.prompt == "still" else c for c in study.clips]
    write_report(study, tmp_path / "report.html", title="{body} and $x$")
    text = (tmp_path / "report.html").read_text()
    assert "<h1>{body} and $x$</h1>" in text
    assert "<title>{body} and $x$</title>" in text
    assert text.count("<h2>Clips</h2>") == 1
    assert text.count(prompt) == 2  # label and alt text of the clip
    trace_of = {prompt: (trace([1, 2]), 0), "plain": (trace([1, 2]), 0)}
    draw_traces(trace_of, tmp_path / "plot.svg", title="a $\\bad title")
    assert (tmp_path / "plot.svg").stat().st_size > 1000


def test_gif_shows_every_pixel_of_every_frame() -> None:
    first, second = torch.rand(2, 5, 6, 7, generator=torch.Generator().manual_seed(0))
    image = Image.open(io.BytesIO(gif([first, second], scale=3, gap=2)))
    assert getattr(image, "n_frames", 1) == 5
    for frame in range(5):
        image.seek(frame)
        shown = torch.frombuffer(bytearray(image.convert("L").tobytes()), dtype=torch.uint8).view(18, 44)
        assert (shown[:, 21:23] == 255).all()
        for video, square in ((first, shown[:, :21]), (second, shown[:, 23:])):
            assert torch.equal(square[1::3, 1::3], (video[frame] * 255).round().byte())
            assert torch.equal(square[::3, ::3], square[2::3, 2::3])


def test_same_study_gives_the_same_report(study: Study, tmp_path: Path) -> None:
    write_report(study, tmp_path / "a.html")
    write_report(study, tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()

# SPDX-License-Identifier: Apache-2.0
"""The report of a comparison of caching methods: tables, findings, and one self-contained HTML file."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from adacache.files import write_json, write_text
from adacache.plots import draw_traces
from adacache.trace import Trace

Table = tuple[list[str], list[list[str]]]
"""Header and rows."""

SCALE = 4
"""Screen pixels per pixel of a clip."""
GAP = 12
"""Screen pixels between clips."""
FRAME_MILLISECONDS = 60
MOTION_COLORS = {
    "resting": ("#0072b2", "#56b4e9"),
    "drifting": ("#009e73", "#7fc97f"),
    "racing": ("#d55e00", "#e69f00"),
}


@dataclass(frozen=True)
class Clip:
    """One generated clip."""

    prompt: str
    motion: str
    """Motion class: "resting", "drifting" or "racing"."""
    seed: int
    method: str
    video: Tensor
    """[T, H, W] float32 in 0 .. 1."""
    seconds: float
    """Wall-clock time of the denoising loop."""
    computed: int
    """Steps that ran the block stack."""
    psnr: float | None = None
    """Against the clip without caching, in dB; infinite if both are equal, None for that clip itself."""
    ssim: float | None = None
    trace: Trace | None = None


@dataclass(frozen=True)
class Study:
    """All clips of a comparison: every prompt and seed with every method."""

    baseline: str
    """The method that the others are compared to."""
    methods: list[str]
    """All methods, the baseline first."""
    num_steps: int
    published_cache_bytes: int
    """Bytes of one residual per sub-layer, which the published code caches."""
    facts: dict[str, str] = field(default_factory=dict)
    """How it was measured."""
    settings: dict[str, str] = field(default_factory=dict)
    """The settings of each method as text."""
    clips: list[Clip] = field(default_factory=list)

    def of(self, method: str, motion: str | None = None) -> list[Clip]:
        """The clips of a method, optionally of one motion class."""
        return [c for c in self.clips if c.method == method and motion in (None, c.motion)]

    @property
    def motions(self) -> list[str]:
        """Motion classes in order of appearance."""
        return list(dict.fromkeys(clip.motion for clip in self.clips))

    @property
    def takes(self) -> list[tuple[str, int]]:
        """Pairs of prompt and seed in order of appearance."""
        return list(dict.fromkeys((clip.prompt, clip.seed) for clip in self.clips))

    def seconds(self, method: str) -> float:
        """Median over the clips."""
        return median(clip.seconds for clip in self.of(method))

    def computed(self, method: str, motion: str | None = None) -> float:
        """Mean computed steps."""
        return fmean(clip.computed for clip in self.of(method, motion))

    def psnr(self, method: str, motion: str | None = None) -> float:
        """Mean over the clips in dB."""
        return fmean(clip.psnr for clip in self.of(method, motion) if clip.psnr is not None)

    def ssim(self, method: str) -> float:
        return fmean(clip.ssim for clip in self.of(method) if clip.ssim is not None)

    def cache_bytes(self, method: str) -> int:
        """Bytes of all cached residuals of one clip."""
        return max((clip.trace.cache_bytes for clip in self.of(method) if clip.trace is not None), default=0)


def method_table(study: Study) -> Table:
    """Computed steps, seconds, speedup, PSNR, SSIM and cache size of each method."""
    header = [
        "method",
        "computed steps",
        "seconds",
        "speedup",
        "PSNR dB",
        "SSIM",
        "cache KiB",
        "published KiB",
    ]
    rows = []
    for method in study.methods:
        row = [method, f"{study.computed(method):.1f} of {study.num_steps}", f"{study.seconds(method):.3f}"]
        row.append(f"{study.seconds(study.baseline) / study.seconds(method):.2f}x")
        if method == study.baseline:
            row += ["-"] * 4
        else:
            row += [decibels(study.psnr(method)), f"{study.ssim(method):.4f}"]
            row += [f"{study.cache_bytes(method) / 1024:.0f}", f"{study.published_cache_bytes / 1024:.0f}"]
        rows.append(row)
    return header, rows


def motion_table(study: Study) -> Table:
    """Mean computed steps and PSNR of each method but the baseline, by motion class."""
    header = ["method", *(f"{motion}: {what}" for motion in study.motions for what in ("steps", "dB"))]
    rows = []
    for method in study.methods:
        if method != study.baseline:
            row = [method]
            for motion in study.motions:
                row += [f"{study.computed(method, motion):.1f}", decibels(study.psnr(method, motion))]
            rows.append(row)
    return header, rows


def motion_finding(study: Study, plain: str, regularised: str) -> str:
    """One sentence: did motion regularisation move computed steps from still to fast clips?"""
    still, fast = study.motions[0], study.motions[-1]
    change = {m: study.computed(regularised, m) - study.computed(plain, m) for m in study.motions}
    gain = {m: study.psnr(regularised, m) - study.psnr(plain, m) for m in study.motions}
    steps = ", ".join(f"{m} {change[m]:+.1f}" for m in study.motions)
    quality = ", ".join(f"{m} {gain[m]:+.1f}" for m in study.motions)
    moved = change[fast] - change[still]
    if moved >= 0.25:
        verdict = f"{regularised} moved computed steps to the clips with motion"
    elif moved <= -0.25:
        verdict = f"{regularised} moved computed steps away from the clips with motion"
    else:
        verdict = f"{regularised} did not move computed steps between still and moving clips"
    return f"{verdict}: against {plain}, steps {steps}; PSNR {quality} dB."


def decibels(psnr: float) -> str:
    """A PSNR for a table; "same" if it is infinite, that is, for equal clips."""
    return "same" if math.isinf(psnr) else f"{psnr:.2f}"


class Page:
    """A self-contained HTML file. All texts are escaped; `add` takes HTML."""

    def __init__(self, title: str):
        self._title = title
        self._parts = [f"<h1>{escape(title)}</h1>"]

    def add(self, html: str) -> None:
        self._parts.append(html)

    def heading(self, text: str) -> None:
        self.add(f"<h2>{escape(text)}</h2>")

    def text(self, text: str) -> None:
        self.add(f"<p>{escape(text)}</p>")

    def note(self, text: str) -> None:
        self.add(f"<p class=note>{escape(text)}</p>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table; with empty headings, without a head."""
        head = f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in header)}</tr>" if any(header) else ""
        cells = [[f"<td>{escape(str(cell))}</td>" for cell in row] for row in rows]
        body = "".join(f"<tr>{''.join(row)}</tr>" for row in cells)
        self.add(f"<div class=wide><table>{head}{body}</table></div>")

    def write(self, path: str | Path) -> None:
        head, end = _PAGE.split("{body}")
        write_text(path, head.replace("{title}", escape(self._title)) + "\n".join(self._parts) + end)


def write_report(
    study: Study, path: str | Path, findings: Sequence[str] = (), title: str = "AdaCache demo"
) -> None:
    """Writes one self-contained HTML file: clips side by side, tables, schedules, settings."""
    page = Page(title)
    page.text(_introduction(study))
    page.heading("Clips")
    page.add(_clips(study))
    page.heading("Cost and quality")
    page.table(*method_table(study))
    page.note(
        "Seconds: median time of the denoising loop over the clips. PSNR and SSIM: mean over the clips, "
        f"against {study.baseline}. Cache: all residuals cached for one clip, including the metric's; "
        "published: one residual per sub-layer."
    )
    page.heading("By motion")
    page.table(*motion_table(study))
    for finding in findings:
        page.text(finding)
    page.heading("Schedules")
    page.text(
        "A dot is a computed step; the other steps reuse the last computed residual. Curves: the relative "
        "distance of the residual to that of the last computed step (the codebook maps the distance, divided "
        "by the rate, to the next rate), and its motion between frames."
    )
    for method in study.methods:
        if method != study.baseline:
            page.add(_schedules(study, method))
    page.heading("Settings")
    page.table(["method", "settings"], [[method, text] for method, text in study.settings.items()])
    page.heading("How it was measured")
    page.table(["", ""], [[name, text] for name, text in study.facts.items()])
    page.write(path)


def write_results(study: Study, path: str | Path) -> None:
    """Writes the results of every clip as JSON."""
    clips = [
        {
            "prompt": clip.prompt,
            "seed": clip.seed,
            "method": clip.method,
            "seconds": clip.seconds,
            "computed": clip.computed,
            "steps": None if clip.trace is None else clip.trace.steps_of(0),
            # JSON has no infinity.
            "psnr": None if clip.psnr is None or math.isinf(clip.psnr) else clip.psnr,
            "ssim": clip.ssim,
        }
        for clip in study.clips
    ]
    values: dict[str, Any] = {"facts": study.facts, "settings": study.settings, "clips": clips}
    write_json(path, values)


def gif(
    videos: Sequence[Tensor],
    scale: int = SCALE,
    gap: int = GAP,
    milliseconds: float = FRAME_MILLISECONDS,
) -> bytes:
    """Clips side by side in one animated GIF, which keeps them synchronous.

    Args:
        videos: grey [T, H, W] or colored [T, H, W, 3], in 0 .. 1, all of one kind.
        scale: every pixel becomes a square of `scale` x `scale` pixels.
        gap: white columns between clips.
        milliseconds: per frame.
    """
    from PIL import Image

    levels = [(video.clamp(0, 1) * 255).round().byte() for video in videos]
    squares = [grey.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2) for grey in levels]
    between = squares[0].new_full((*squares[0].shape[:2], gap, *squares[0].shape[3:]), 255)
    strips = [piece for square in squares for piece in (square, between)][:-1]
    frames = [Image.fromarray(frame.numpy()) for frame in torch.cat(strips, dim=2)]
    buffer = io.BytesIO()
    frames[0].save(
        buffer, "GIF", save_all=True, append_images=frames[1:], duration=round(milliseconds), loop=0
    )
    return buffer.getvalue()


def _introduction(study: Study) -> str:
    prompts = len({prompt for prompt, _ in study.takes})
    return (
        f"{len(study.takes)} clips from {prompts} prompts, each generated {len(study.methods)} times from "
        f"the same noise with {study.num_steps} denoising steps: {', '.join(study.methods)}."
    )


def _clips(study: Study) -> str:
    by_take = {(clip.prompt, clip.seed, clip.method): clip for clip in study.clips}
    height, width = (SCALE * size for size in study.clips[0].video.shape[1:])
    column = f'style="width:{width + GAP}px"'
    head = "".join(f"<th {column}>{escape(method)}</th>" for method in study.methods)
    rows = [f"<tr><th>prompt</th>{head}</tr>"]
    for prompt, seed in study.takes:
        clips = [by_take[prompt, seed, method] for method in study.methods]
        data = base64.b64encode(gif([clip.video for clip in clips])).decode()
        image = (
            f"<img class=clip width={len(clips) * (width + GAP) - GAP} height={height} "
            f'alt="{escape(prompt)}: {escape(", ".join(study.methods))}" src="data:image/gif;base64,{data}">'
        )
        label = f"{escape(prompt)}<div class=note>seed {seed}</div>"
        rows.append(f"<tr><td rowspan=2>{label}</td><td colspan={len(clips)}>{image}</td></tr>")
        rows.append(f"<tr>{''.join(f'<td class=note>{_below(clip)}</td>' for clip in clips)}</tr>")
    return f"<div class=wide><table class=clips>{''.join(rows)}</table></div>"


def _below(clip: Clip) -> str:
    text = f"{clip.computed} steps, {clip.seconds:.2f} s"
    if clip.psnr is None:
        return text
    return f"{text}<br>{decibels(clip.psnr)}{'' if math.isinf(clip.psnr) else ' dB'}"


def _schedules(study: Study, method: str) -> str:
    """The schedules of the first seed of every prompt."""
    traces: dict[str, tuple[Trace, int]] = {}
    colors: list[str] = []
    seen: dict[str, int] = {}
    for clip in study.of(method):
        if clip.trace is None or clip.prompt in traces:
            continue
        traces[clip.prompt] = (clip.trace, 0)
        shades = MOTION_COLORS.get(clip.motion, ("#000000",))
        colors.append(shades[seen.get(clip.motion, 0) % len(shades)])
        seen[clip.motion] = seen.get(clip.motion, 0) + 1
    if not traces:
        return ""
    buffer = io.BytesIO()
    draw_traces(traces, buffer, title=f"{method}: computed steps (number at the right)", colors=colors)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img class=plot alt="schedules of {escape(method)}" src="data:image/svg+xml;base64,{data}">'


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; margin-bottom: .3rem }
h2 { font-size: 1.15rem; margin: 2rem 0 .6rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th { text-align: left; font-weight: 600; border-bottom: 2px solid #ccc }
th, td { padding: .3rem 1.2rem .3rem 0; vertical-align: top }
td { border-bottom: 1px solid #eee }
.clips { table-layout: fixed; width: min-content }
.clips th:first-child { width: 11rem }
.clips td, .clips th { padding-right: 0; border: 0 }
.clips td[rowspan] { padding-right: 1rem }
.clip { display: block; image-rendering: pixelated }
.note { color: #666; font-size: .85rem }
.plot { max-width: 100%; margin: .5rem 0 1rem }
.wide { overflow-x: auto }
.row { display: flex; gap: 12px }
figure { flex: none; margin: 0 0 .8rem; overflow-wrap: anywhere }
</style>
</head>
<body>
{body}
</body>
</html>
"""

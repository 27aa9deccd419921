# SPDX-License-Identifier: Apache-2.0
"""Plots of schedules and of the measurements behind them (needs matplotlib)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Protocol

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442", "#000000")
MARKERS = (("o", "-"), ("s", "--"), ("^", ":"), ("D", "-."))
"""Marker and line of the curves with the first colors, with the same colors again, and so on."""


class Drawable(Protocol):
    """What is plotted of a trace."""

    @property
    def computed(self) -> Sequence[Sequence[bool]]:
        """Per step, per video, whether the block stack was computed."""

    def steps_of(self, video: int) -> list[int]:
        """The 1-based computed steps of one video."""

    def series(self, name: str, video: int = 0) -> Mapping[str, Sequence[tuple[int, float]]]:
        """Per site, the (step, value) pairs of "distance", "motion" or "factor" of one video."""


def draw_traces(
    traces: Mapping[str, tuple[Drawable, int]],
    path: str | Path | IO[bytes],
    title: str = "",
    colors: Sequence[str] = COLORS,
) -> None:
    """Plots (trace, video) pairs by label: a row of dots for computed steps, curves of distance and motion.

    The factor of the motion regularisation is plotted too where it is not 1.

    Args:
        traces: traces and videos, by label.
        path: file to write, in the format of its suffix, or a binary stream, which receives SVG.
        title: title of the plot; "": the default one.
        colors: colours of the labels in order, repeated if there are too few.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot: matplotlib is missing; pip install 'adacache-kernels[demo]'") from error

    panels = ["distance", "motion"]
    factors = [
        v for trace, video in traces.values() for c in trace.series("factor", video).values() for _, v in c
    ]
    if any(value != 1 for value in factors):
        panels.append("factor")
    rows = 0.5 + 0.24 * len(traces)
    # Figure without pyplot: no global state and no display.
    figure = Figure(figsize=(9, 0.9 + rows + 1.7 * len(panels)), layout="constrained")
    axes = figure.subplots(
        1 + len(panels), 1, sharex=True, gridspec_kw={"height_ratios": [rows, *[1.7] * len(panels)]}
    )
    schedule, curves = axes[0], dict(zip(panels, axes[1:], strict=True))
    last = 1
    for row, (trace, video) in enumerate(traces.values()):
        color, steps = colors[row % len(colors)], trace.steps_of(video)
        last = max(last, len(trace.computed))
        schedule.hlines(row, 1, len(trace.computed), color="#dddddd", zorder=1)
        schedule.plot(steps, [row] * len(steps), "o", color=color, markersize=5, zorder=2)
        schedule.annotate(
            str(len(steps)), (1.01, row), xycoords=("axes fraction", "data"), va="center", color=color
        )
        for name, axis in curves.items():
            for curve in trace.series(name, video).values():
                axis.plot(*zip(*curve, strict=True), marker=".", linewidth=1.2, color=color)
    # Labels and titles are data: a $ in them is not mathematics.
    schedule.set_yticks(range(len(traces)), list(traces), fontsize=8, parse_math=False)
    schedule.set_ylim(len(traces) - 0.5, -0.5)
    schedule.set_title(title or "computed steps (number at the right)", fontsize=10, parse_math=False)
    schedule.spines[["top", "right", "left"]].set_visible(False)
    schedule.tick_params(left=False)
    for name, axis in curves.items():
        axis.set_ylabel(name)
        axis.grid(color="#eeeeee")
        axis.spines[["top", "right"]].set_visible(False)
    curves["distance"].set_ylim(bottom=0)
    curves["motion"].set_ylim(bottom=0)
    if "factor" in curves:
        curves["factor"].axhline(1, color="#999999", linewidth=0.8)
    axes[-1].set_xlabel("step")
    axes[-1].set_xlim(0.5, last + 0.5)
    # A fixed salt makes the file deterministic.
    with rc_context({"svg.hashsalt": "adacache"}):
        if isinstance(path, str | Path):
            figure.savefig(path, dpi=110)
        else:
            figure.savefig(path, format="svg", metadata={"Date": None})


def draw_curves(
    curves: Mapping[str, Sequence[tuple[float, float]]], path: str | Path, across: str, up: str
) -> None:
    """Plots points (x, y) joined by lines, one line per label; `across` and `up` name the axes."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot: matplotlib is missing; pip install 'adacache-kernels[demo]'") from error
    figure = Figure(figsize=(8.4, 4.6), layout="constrained")
    axis = figure.subplots()
    for place, (label, points) in enumerate(curves.items()):
        style, color = MARKERS[place // len(COLORS) % len(MARKERS)], COLORS[place % len(COLORS)]
        axis.plot(*zip(*points, strict=True), marker=style[0], linestyle=style[1], color=color, label=label)
    axis.set_xlabel(across)
    axis.set_ylabel(up)
    axis.grid(color="#eeeeee")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=110)

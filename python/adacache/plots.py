"""Pictures of schedules and of what led to them (needs matplotlib)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adacache.trace import Trace

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442", "#000000")


def draw_traces(traces: Mapping[str, tuple[Trace, int]], path: str | Path, title: str = "") -> None:
    """Draws (trace, video) pairs by label: computed steps as rows of dots, distance and motion as curves over
    them."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot: matplotlib is missing; pip install 'adacache-kernels[demo]'") from error

    # Figure without pyplot: no global state, no display.
    figure = Figure(figsize=(9, 1.4 + 0.28 * len(traces) + 4.2), layout="constrained")
    schedule, distance, motion = figure.subplots(
        3, 1, sharex=True, gridspec_kw={"height_ratios": [0.6 + 0.28 * len(traces), 2.1, 2.1]}
    )
    last = 1
    for row, (label, (trace, video)) in enumerate(traces.items()):
        color, steps = COLORS[row % len(COLORS)], trace.steps_of(video)
        last = max(last, len(trace.computed))
        schedule.hlines(row, 1, len(trace.computed), color="#dddddd", zorder=1)
        schedule.plot(steps, [row] * len(steps), "o", color=color, markersize=5, zorder=2)
        schedule.annotate(
            str(len(steps)), (1.005, row), xycoords=("axes fraction", "data"), va="center", color=color
        )
        for axis, name in ((distance, "distance"), (motion, "motion")):
            for curve in trace.series(name, video).values():
                axis.plot(*zip(*curve, strict=True), marker=".", linewidth=1.2, color=color, label=label)
    schedule.set_yticks(range(len(traces)), list(traces))
    schedule.set_ylim(len(traces) - 0.5, -0.5)
    schedule.set_title(title or "computed steps (their number at the right)", fontsize=10)
    distance.set_ylabel("distance")
    distance.set_yscale("log")
    motion.set_ylabel("motion")
    motion.set_xlabel("step")
    motion.set_xlim(0.5, last + 0.5)
    for axis in (distance, motion):
        axis.grid(color="#eeeeee")
    handles = dict(zip(*reversed(distance.get_legend_handles_labels()), strict=True))
    if len(traces) > 1 and handles:
        distance.legend(handles.values(), handles.keys(), fontsize=8, ncols=2)
    figure.savefig(path, dpi=110)

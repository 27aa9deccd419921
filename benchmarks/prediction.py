# SPDX-License-Identifier: Apache-2.0
"""Writes predictions for the CUDA kernels to benchmarks/README.md: bytes, registers, occupancy, and times on
an H100. No GPU is needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cases import CASES, SHAPES, Case

README = Path(__file__).with_name("README.md")
REPORT = Path(__file__).resolve().parent.parent / "build" / "kernel_report.json"
BEGIN, END = "<!-- predictions: python benchmarks/kernels.py --predict -->", "<!-- end of predictions -->"
ARCHITECTURE = "sm_90"
PEAK = 3.35e12  # bytes per second, H100 SXM (NVIDIA data sheet)
COPY_SHARE = 0.90  # of the peak, for a large copy; an assumption
ELEMENT = 2  # bfloat16
GOAL_NAMES = {
    "share_of_copy_rate": "{:.0%} of copy",
    "times_eager": "{:g} x eager",
    "times_compiled": "{:g} x compile",
    "times_peer": "{:g} x FlashInfer",
}


def write_predictions() -> None:
    if not REPORT.exists():
        raise SystemExit(f"{REPORT}: not found; run: make kernel-report")
    report = {u["kernel"]: u for u in json.loads(REPORT.read_text()) if u["arch"] == ARCHITECTURE}
    if missing := sorted({c.kernel for c in CASES if c.kernel} - set(report)):
        raise SystemExit(f"{REPORT.name}: missing {', '.join(missing)} for {ARCHITECTURE}")
    text = README.read_text()
    head, rest = text.split(BEGIN)
    README.write_text(f"{head}{BEGIN}\n{predictions(report)}{END}{rest.split(END)[1]}")
    print(f"written to {README}")


def predictions(report: dict[str, Any]) -> str:
    shapes = [SHAPES["480p-2s"], SHAPES["720p-2s"]]
    names = [f"{list(shape.size)}" for shape in shapes]
    rows = [
        ["op", "registers", "blocks per SM", "occupancy", *(f"MB, us at {name}" for name in names), "goal"],
        ["---", *["---:"] * 5, "---"],
    ]
    for case in CASES:
        if case.channels is not None:
            continue
        usage = report.get(case.kernel)
        resources = (
            ["Triton"] * 3
            if usage is None
            else [str(usage["registers"]), str(usage["blocks"]), f"{usage['occupancy']:.0%}"]
        )
        times = [f"{case.bytes(s, ELEMENT) / 1e6:.0f}, {predicted_microseconds(case, s):.0f}" for s in shapes]
        goals = ", ".join(GOAL_NAMES[what].format(least) for what, least in case.gpu_goals.items())
        rows.append([f"`{case.op}`{case.name.removeprefix(case.op)}", *resources, *times, goals or "-"])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def predicted_microseconds(case: Case, shape: Any) -> float:
    return 1e6 * case.bytes(case.at(shape), ELEMENT) / (COPY_SHARE * PEAK)

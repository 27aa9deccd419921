# SPDX-License-Identifier: Apache-2.0
"""Hooks of mkdocs: `<!-- generated: NAME -->` in a page is replaced by what `GENERATED[NAME]` returns."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MARKER = re.compile(r"<!-- generated: (\w+) -->")
TIERS = {"bits": "bits", "close": "close", "sums": "sums"}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for each page."""
    return MARKER.sub(lambda match: GENERATED[match[1]](), markdown)


def costs() -> str:
    """A table of the ops: minimum bytes and numerics tier, from the benchmark's cases."""
    sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT)]
    from cases import CASES, SHAPES

    shape = SHAPES["480p-2s"]
    lines = [
        f"| op | least bytes | MB at {list(shape.size)}, bfloat16 | tier of each result |",
        "|---|---|---:|---|",
    ]
    for case in CASES:
        passes = f"{case.passes:g} E" if case.passes else ""
        float8 = f"{case.float8_passes:g} B N (C + 4)" if case.float8_passes else ""
        name = f"`{case.op}`{case.name.removeprefix(case.op)}"
        size = f"{case.bytes(case.at(shape), 2) / 1e6:.0f}"
        lines.append(
            f"| {name} | {' + '.join(filter(None, (passes, float8)))} | {size} | {', '.join(case.checks)} |"
        )
    return "\n".join(lines)


def commands() -> str:
    """The help of `adacache` and of each of its commands."""
    sys.path[:0] = [str(ROOT / "python"), str(ROOT)]
    from adacache.commands.cli import _parser

    parser = _parser()
    subparsers = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    sections = []
    for name, command in subparsers.choices.items():
        command.formatter_class = _Wide
        sections.append(f"## adacache {name}\n```text\n{command.format_help().strip()}\n```")
    return "\n\n".join(sections)


class _Wide(argparse.HelpFormatter):
    """Help in 90 columns, whatever the terminal has."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=90)


GENERATED: dict[str, Callable[[], str]] = {"costs": costs, "commands": commands}

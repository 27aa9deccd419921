# SPDX-License-Identifier: Apache-2.0
"""Plain tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from adacache.checks import printable


def format_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Pads columns, aligns numbers right and text left, and escapes control characters."""
    cells = [[printable(str(cell)).replace("\n", r"\n") for cell in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(header), *cells]) for i in range(len(header))]
    right = [all(_numeric(row[i]) for row in cells) for i in range(len(header))]

    def line(values: Sequence[str]) -> str:
        padded = (v.rjust(w) if r else v.ljust(w) for v, w, r in zip(values, widths, right, strict=True))
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *(line(row) for row in cells)])


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    print(format_table(header, rows))


def _numeric(cell: str) -> bool:
    return (bool(cell) and cell.lstrip("-+")[:1].isdigit()) or cell in ("-", "")

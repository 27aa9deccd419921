# SPDX-License-Identifier: Apache-2.0
"""`adacache compare`: caching methods on a user's own model and prompts, beside sampling with fewer steps."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from adacache.checks import refuse
from adacache.commands.options import (
    real_number,
    require_packages,
)
from adacache.commands.subjects import add_prompts, add_subject, subject_and_prompts
from adacache.commands.table import print_table
from adacache.files import check_writable, write_json

PAGE, RESULTS, PLOT = "compare.html", "compare.json", "compare.png"
DEFAULT_METHODS = ("Interval(interval=3)", "TaylorSeer(interval=3)")


def add(commands: Any) -> None:
    """Adds the command to a parser's commands."""
    command = commands.add_parser(
        "compare",
        help="compare caching methods on your model and prompts: table, plot, clips side by side",
        description="Generates each prompt from the same noise with all steps, with each method, and with as "
        "few steps as the methods compute, and compares the clips with those of all steps.",
    )
    add_subject(command)
    command.add_argument(
        "--methods",
        nargs="+",
        default=DEFAULT_METHODS,
        metavar="METHOD",
        help="a class of adacache with its arguments, such as 'TaylorSeer(interval=3)'; a preset, such as "
        "open-sora/fast; or a file of `adacache calibrate`, for planned paths with a budget: "
        f"'paths.json(budget=10)' (default: {' '.join(DEFAULT_METHODS)})",
    )
    add_prompts(command, "prompts that are used")
    command.add_argument(
        "--latents", action="store_true", help="compare a pipeline's latents instead of its decoded clips"
    )
    command.add_argument(
        "--fps",
        type=real_number(above=0, most=50),
        default=16.0,
        help="frames per second of the page's clips (default: %(default)g)",
    )
    command.add_argument(
        "--out",
        type=Path,
        default=Path("adacache_compare"),
        help=f"folder for {PAGE}, {RESULTS} and {PLOT} (default: %(default)s)",
    )
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    from adacache.commands import comparison
    from adacache.plots import draw_curves

    require_packages("compare", {"matplotlib": "matplotlib", "PIL": "pillow"})
    methods = [comparison.method_of(text) for text in options.methods]
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    for file in (PAGE, RESULTS, PLOT):
        check_writable(out / file, "--out")
    subject, prompts = subject_and_prompts(options, decoded=not options.latents)
    if not prompts:
        refuse("--prompts", "a file with at least one prompt, because the model has none", options.prompts)
    found = comparison.compare(
        subject,
        prompts[: options.count],
        methods,
        seed=options.seed,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    write_json(out / RESULTS, comparison.values(found))
    draw_curves(comparison.curves(found), out / PLOT, "computed steps", "PSNR in dB against all steps")
    comparison.write_page(found, out / PAGE, out / PLOT, options.fps)
    print_table(*comparison.table(found))
    print(f"clips side by side: {out / PAGE}")
    return 0

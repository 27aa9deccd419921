"""`adacache compare`: caching methods on a user's own model and prompts, beside sampling with fewer steps."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from adacache.checks import refuse
from adacache.commands.calibrate import SUBJECTS
from adacache.commands.options import (
    input_file,
    json_object,
    real_number,
    require_packages,
    whole_number,
)
from adacache.commands.table import print_table
from adacache.files import MEBIBYTE, check_writable, read_text, write_json

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
    command.add_argument(
        "model",
        help=f"{', '.join(SUBJECTS)}, the folder of a saved diffusers pipeline, or module:function, as for "
        "`adacache calibrate`",
    )
    command.add_argument(
        "--methods",
        nargs="+",
        default=DEFAULT_METHODS,
        metavar="METHOD",
        help="a class of adacache with its arguments, such as 'TaylorSeer(interval=3)'; a preset, such as "
        "open-sora/fast; or a file of `adacache calibrate`, for planned paths with a budget: "
        f"'paths.json(budget=10)' (default: {' '.join(DEFAULT_METHODS)})",
    )
    command.add_argument("--prompts", type=input_file, help="text file, one prompt per line")
    command.add_argument(
        "--count", type=whole_number(1), default=6, help="prompts that are used (default: %(default)s)"
    )
    command.add_argument("--num-steps", type=whole_number(1), help="steps of the sampler")
    command.add_argument(
        "--arguments",
        type=json_object,
        default={},
        help="JSON object with further arguments of the pipeline's call",
    )
    command.add_argument(
        "--seed",
        type=whole_number(0, (1 << 63) - 1),
        default=0,
        help="seed of the first prompt; the next ones count up (default: %(default)s)",
    )
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
    from adacache.calibration import subject_of
    from adacache.commands import comparison
    from adacache.plots import draw_curves

    require_packages("compare", {"matplotlib": "matplotlib", "PIL": "pillow"})
    methods = [comparison.method_of(text) for text in options.methods]
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    for file in (PAGE, RESULTS, PLOT):
        check_writable(out / file, "--out")
    name = SUBJECTS.get(options.model, options.model)
    subject, prompts = subject_of(name, options.num_steps, options.arguments, decoded=not options.latents)
    if options.prompts:
        lines = read_text(options.prompts, MEBIBYTE).splitlines()
        prompts = [line.strip() for line in lines if line.strip()]
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

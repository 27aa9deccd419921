# SPDX-License-Identifier: Apache-2.0
"""`adacache calibrate`: planned paths (the default) or a codebook for a model and a sampler."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from adacache.commands.options import input_file, output_file, real_number, whole_number
from adacache.commands.subjects import add_prompts, add_subject, subject_and_prompts
from adacache.commands.table import print_table

PATH, CODEBOOK = "path", "codebook"
DEFAULT_OUT = "adacache.json"


def add(commands: Any) -> None:
    """Adds the command to a parser's commands."""
    command = commands.add_parser(
        "calibrate",
        help="find planned paths, or a codebook, for a model and a sampler",
        description="Finds which steps to compute, and how far to extrapolate between them, for several "
        "numbers of computed steps (planned paths); or, with --method codebook, a codebook for AdaCache.",
    )
    add_subject(command)
    command.add_argument(
        "--method",
        choices=(PATH, CODEBOOK),
        help="path, or codebook (default: path; codebook if --share, --error or --like is given)",
    )
    add_prompts(command, "prompts on which the result is chosen")
    command.add_argument(
        "--held-out",
        type=whole_number(1),
        default=4,
        help="further prompts on which it is evaluated (default: %(default)s)",
    )
    command.add_argument(
        "--probed",
        type=whole_number(0),
        help="of the --count prompts, those with extra runs, which measure where in the schedule reuse harms "
        "the output most (default: half of them; for a codebook, 2)",
    )
    command.add_argument(
        "--out",
        type=output_file,
        help=f"file for adacache.enable (default: {DEFAULT_OUT}; with --adaptive, its file)",
    )
    paths = command.add_argument_group("planned paths")
    paths.add_argument(
        "--budgets",
        type=whole_numbers,
        help="numbers of computed steps, such as 15,12,10 (default: a half to a fifth of the steps)",
    )
    paths.add_argument(
        "--level",
        choices=("guided", "branch", "stack"),
        default="guided",
        help="what is extrapolated: the guided output, the output of each guidance branch, or the residual "
        "of the block stack (default: %(default)s)",
    )
    paths.add_argument(
        "--refine",
        type=whole_number(1),
        help="paths of each budget that are run; 1: only the one that is predicted to be best (default: 12)",
    )
    paths.add_argument(
        "--adaptive",
        type=input_file,
        metavar="FILE",
        help="only add to this file of planned paths what chooses a number of computed steps for each video",
    )
    paths.add_argument(
        "--work",
        help="folder in which full runs are kept until the calibration is done, so that it can be resumed "
        "(default: the name of --out with .work)",
    )
    paths.add_argument("--plot", type=output_file, help="image file: PSNR against computed steps")
    codebook = command.add_argument_group("codebook")
    goal = codebook.add_mutually_exclusive_group()
    goal.add_argument(
        "--share", type=real_number(above=0, most=1), help="largest share of computed steps (default: 0.4)"
    )
    goal.add_argument(
        "--error", type=real_number(above=0), help="largest predicted mean relative error of the output"
    )
    goal.add_argument("--like", help='same share of computed steps as a preset, e.g. "open-sora/fast"')
    codebook.add_argument(
        "--metric-block", type=whole_number(0), help="measured block (default: the middle one)"
    )
    codebook.add_argument(
        "--metric-part", help="measured sub-layer (default: the model's (temporal) self-attention)"
    )
    codebook.add_argument(
        "--tokens", type=whole_number(1), help="tokens per video that are recorded (default: 512)"
    )
    command.set_defaults(run=run)


def whole_numbers(text: str) -> list[int]:
    """Whole numbers separated by commas."""
    convert = whole_number(1)
    return [convert(part.strip()) for part in text.split(",")]


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    method = _method(options)
    subject, prompts = subject_and_prompts(options)
    needed = options.count + options.held_out
    if len(prompts) < needed:
        raise ValueError(f"--prompts: expected at least {needed} (--count + --held-out), got {len(prompts)}")
    chosen, held_out = prompts[: options.count], prompts[options.count : needed]
    calibrate = _paths if method == PATH else _codebook
    calibrate(options, subject, chosen, held_out)
    return 0


def _method(options: argparse.Namespace) -> str:
    """The method; refuses options of the other one."""
    of_paths = {
        "--budgets": options.budgets,
        "--refine": options.refine,
        "--work": options.work,
        "--plot": options.plot,
        "--adaptive": options.adaptive,
    }
    of_codebooks = {
        "--share": options.share,
        "--error": options.error,
        "--like": options.like,
        "--metric-block": options.metric_block,
        "--metric-part": options.metric_part,
        "--tokens": options.tokens,
    }
    goals = ("--share", "--error", "--like")
    given = any(of_codebooks[name] is not None for name in goals)
    method: str = options.method or (CODEBOOK if given else PATH)
    for name, value in (of_codebooks if method == PATH else of_paths).items():
        if value is not None:
            other = CODEBOOK if method == PATH else PATH
            raise ValueError(f"{name}: expected with --method {other} only, got {value}")
    return method


def _paths(options: argparse.Namespace, subject: Any, prompts: list[Any], held_out: list[Any]) -> None:
    from adacache.calibration import calibrate_paths

    if options.adaptive:
        _adaptive(options, subject, prompts, held_out)
        return
    out = Path(options.out or DEFAULT_OUT)
    found = calibrate_paths(
        subject,
        prompts,
        held_out,
        budgets=options.budgets,
        level=options.level,
        seed=options.seed,
        probed=options.probed,
        **({} if options.refine is None else {"refine": options.refine}),
        work=options.work or out.with_name(out.name + ".work"),
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    found.write(out)
    print_table(*path_table(found))
    if options.plot:
        from adacache.plots import draw_curves

        draw_curves(path_curves(found), options.plot, "computed steps", "PSNR in dB, held-out prompts")
        print(f"plot: {options.plot}")
    number = max(found.budgets)
    print(
        f"{found.seconds:.0f} s; written to {out}: "
        f"adacache.enable(model, {str(out)!r}, num_steps={subject.num_steps}, budget={number})"
    )


def _adaptive(options: argparse.Namespace, subject: Any, prompts: list[Any], held_out: list[Any]) -> None:
    from adacache.calibration import calibrate_adaptive

    for name in ("budgets", "refine", "probed", "work", "plot"):
        value = getattr(options, name)
        if value is not None:
            raise ValueError(f"--{name}: expected without --adaptive only, got {value}")
    out = options.out or options.adaptive
    found = calibrate_adaptive(
        options.adaptive,
        subject,
        prompts,
        held_out,
        seed=options.seed,
        out=out,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print_table(*adaptive_table(found))
    budget = max(found.prices, default=None)
    print(f"written to {out}: adacache.enable(pipeline, {str(out)!r}, budget={budget}, adaptive=True)")


def adaptive_table(found: Any) -> tuple[list[str], list[list[Any]]]:
    """Headings and rows: one per mean budget, of the held-out prompts."""
    rows = []
    for budget in sorted(found.prices, reverse=True):
        row: list[Any] = [budget]
        for kind in ("adaptive", "planned"):
            results = found.held_out.get(budget, {}).get(kind, [])
            psnrs = [reached for _, reached in results]
            mean = [sum(values) / len(values) for values in zip(*results, strict=True)]
            row += [f"{mean[0]:.1f}", f"{mean[1]:.1f}", f"{min(psnrs):.1f}"] if results else ["-"] * 3
        rows.append(row)
    of_adaptive = ["adaptive steps", "held-out dB", "worst"]
    return ["budget", *of_adaptive, "planned steps", "held-out dB", "worst"], rows


def path_table(found: Any) -> tuple[list[str], list[list[Any]]]:
    """Headings and rows: one per budget."""
    headings = ["computed", "speedup", "fit", "predicted dB", "calibration dB", "held-out dB", "worst"]
    headings += ["fewer steps dB", "worst"]
    rows = []
    for number, budget in sorted(found.budgets.items(), reverse=True):
        name = "timesteps alone" if budget.use == "timesteps" else budget.fit
        row = [number, f"{found.subject.num_steps / number:.2f}x", name]
        row += [f"{budget.predicted:.1f}", f"{budget.calibration[name]:.1f}"]
        for kind in ("planned", "fewer steps"):
            psnrs = budget.held_out.get(kind)
            row += ["-", "-"] if not psnrs else [f"{sum(psnrs) / len(psnrs):.1f}", f"{min(psnrs):.1f}"]
        rows.append(row)
    return headings, rows


def path_curves(found: Any) -> dict[str, list[tuple[float, float]]]:
    """Per method, (computed steps, mean PSNR) of the held-out prompts."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for number, budget in sorted(found.budgets.items()):
        for kind, psnrs in budget.held_out.items():
            curves.setdefault(kind, []).append((number, sum(psnrs) / len(psnrs)))
    return curves


def _codebook(options: argparse.Namespace, subject: Any, prompts: list[Any], held_out: list[Any]) -> None:
    from adacache.calibration import Record, calibrate, write

    share = options.share
    if share is None and options.error is None and options.like is None:
        share = 0.4
    tokens = {} if options.tokens is None else {"tokens": options.tokens}
    found = calibrate(
        subject,
        prompts,
        held_out,
        share=share,
        error=options.error,
        like=options.like,
        seed=options.seed,
        probed=2 if options.probed is None else options.probed,
        recorder=Record(options.metric_block, options.metric_part, **tokens),
        say=lambda line: print(line, flush=True),
    )
    path = str(options.out or DEFAULT_OUT)
    write(path, found)
    print(f"written to {path}: adacache.enable(model, {path!r}, num_steps={subject.num_steps})")

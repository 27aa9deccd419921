"""The command `adacache`: doctor, verify, flops, demo, calibrate, study."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from adacache.checks import printable
from adacache.commands import study
from adacache.commands.options import (
    device,
    input_file,
    json_object,
    output_file,
    real_number,
    whole_number,
)
from adacache.commands.table import print_table
from adacache.files import MEBIBYTE, read_text

SUBJECTS = {"digits": "adacache.digits.subject:subject"}
"""Models that `calibrate` accepts by name, and the function of each."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        print(printable(f"adacache {options.command}: {error}"), file=sys.stderr)
        return 2
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="adacache", description="Adaptive caching for video diffusion transformers."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    doctor = commands.add_parser(
        "doctor", help="show versions, the build, and the backend of each op with the reason"
    )
    doctor.set_defaults(run=_doctor)

    verify = commands.add_parser("verify", help="compare with recorded runs of the published code")
    verify.add_argument("directory", help="folder with weights_*.safetensors, CASE.json and CASE.npz")
    verify.add_argument(
        "--backend", action="append", help="backend (repeatable; default: the one chosen for the device)"
    )
    verify.add_argument(
        "--cache",
        action="append",
        choices=("stack", "sublayer"),
        help="residuals that are cached (repeatable; default: both)",
    )
    verify.add_argument("--device", type=device, default="cpu", help="torch device (default: %(default)s)")
    verify.set_defaults(run=_verify)

    flops = commands.add_parser(
        "flops", help="count the FLOPs of STDiT3-XL/2 per step and schedule, without a GPU"
    )
    flops.add_argument(
        "--video", action="append", help="480p-2s, 720p-2s or FRAMESxHEIGHTxWIDTH (repeatable)"
    )
    flops.add_argument(
        "--num-steps", type=whole_number(1), default=30, help="denoising steps (default: %(default)s)"
    )
    flops.add_argument(
        "--computed-steps",
        type=real_number(0),
        action="append",
        help="mean computed steps of a schedule (repeatable; default: all)",
    )
    flops.add_argument(
        "--trace",
        action="append",
        default=[],
        help="saved trace: counts its schedule (repeatable)",
    )
    flops.set_defaults(run=_flops)

    demo = commands.add_parser("demo", help="generate clips with and without caching and compare them")
    demo.add_argument("--out", default="adacache_demo", help="folder of the report (default: %(default)s)")
    demo.set_defaults(run=_demo)

    calibrate = commands.add_parser(
        "calibrate", help="search a codebook for a model and a sampler, from one full run per prompt"
    )
    calibrate.add_argument(
        "model",
        help=f"{', '.join(SUBJECTS)}, the folder of a saved diffusers pipeline, or module:function. The "
        "function takes the number of steps, or None, and returns an adacache.calibration.Subject and a list "
        "of prompts",
    )
    goal = calibrate.add_mutually_exclusive_group()
    goal.add_argument(
        "--share", type=real_number(above=0, most=1), help="largest share of computed steps (default: 0.4)"
    )
    goal.add_argument(
        "--error", type=real_number(above=0), help="largest predicted mean relative error of the output"
    )
    goal.add_argument("--like", help='same share of computed steps as a preset, e.g. "open-sora/fast"')
    calibrate.add_argument("--prompts", type=input_file, help="text file, one prompt per line")
    calibrate.add_argument(
        "--count",
        type=whole_number(1),
        default=6,
        help="prompts on which the codebook is chosen (default: %(default)s)",
    )
    calibrate.add_argument(
        "--held-out",
        type=whole_number(1),
        default=4,
        help="further prompts on which it is evaluated (default: %(default)s)",
    )
    calibrate.add_argument(
        "--probed",
        type=whole_number(0),
        default=2,
        help="of the --count prompts, those with six extra runs, which measure where in the schedule reuse "
        "harms the output most (default: %(default)s)",
    )
    calibrate.add_argument("--num-steps", type=whole_number(1), help="steps of the sampler")
    calibrate.add_argument(
        "--arguments",
        type=json_object,
        default={},
        help="JSON object with further arguments of the pipeline's call",
    )
    calibrate.add_argument(
        "--metric-block", type=whole_number(0), help="measured block (default: the middle one)"
    )
    calibrate.add_argument(
        "--metric-part", help="measured sub-layer (default: the model's (temporal) self-attention)"
    )
    calibrate.add_argument(
        "--tokens",
        type=whole_number(1),
        default=512,
        help="tokens per video that are recorded (default: %(default)s)",
    )
    calibrate.add_argument(
        "--seed",
        type=whole_number(0, (1 << 63) - 1),
        default=0,
        help="seed of the first prompt; the next ones count up (default: %(default)s)",
    )
    calibrate.add_argument(
        "--out",
        type=output_file,
        default="adacache.json",
        help="file for adacache.enable (default: %(default)s)",
    )
    calibrate.set_defaults(run=_calibrate)

    people = commands.add_parser(
        "study",
        help="make a page on which people compare clips of two methods blindly, or evaluate its results",
    )
    study.add_options(people)
    people.set_defaults(run=study.run)
    return parser


def _doctor(options: argparse.Namespace) -> int:
    from adacache.commands.doctor import report

    print("\n".join(report()))
    return 0


def _verify(options: argparse.Namespace) -> int:
    import torch

    import adacache_kernels
    from adacache.commands.verify import TOLERANCE, verify

    kind = torch.device(options.device).type
    choices = adacache_kernels.backend_report()
    backends = options.backend or [
        next((choice.backend for choice in choices if choice.device == kind), "reference")
    ]
    outcomes = []
    for outcome in verify(
        options.directory,
        backends=backends,
        caches=options.cache or ("stack", "sublayer"),
        device=options.device,
    ):
        outcomes.append(outcome)
        progress = printable(f"{len(outcomes)} runs, last: {outcome.case}")
        print(f"\r{progress}".ljust(78), end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print_table(
        [
            "case",
            "backend",
            "cache",
            "computed",
            "recorded",
            "same steps",
            "latent error",
            "distance error",
            "",
        ],
        [
            [
                o.case,
                o.backend,
                o.cache,
                o.computed,
                o.recorded,
                "yes" if o.steps_match else "NO",
                f"{o.latent_error:.1e}",
                "-" if o.distance_error != o.distance_error else f"{o.distance_error:.1e}",
                "ok" if o.passed else "MISS",
            ]
            for o in outcomes
        ],
    )
    missed = sum(not outcome.passed for outcome in outcomes)
    print(f"{len(outcomes) - missed} of {len(outcomes)} runs are as recorded (latent within {TOLERANCE:.0e})")
    return 1 if missed else 0


def _flops(options: argparse.Namespace) -> int:
    from adacache.commands.flops import count_flops, latent_size, video_size
    from adacache.trace import Trace

    schedules = [
        (f"{steps:g} of {options.num_steps}", options.num_steps, steps)
        for steps in options.computed_steps or []
    ]
    for path in options.trace:
        trace = Trace.load(path)
        schedules.append((path, trace.num_steps, len(trace.computed_steps)))
    schedules = schedules or [(f"all of {options.num_steps}", options.num_steps, float(options.num_steps))]
    rows = []
    for name, size in [(name, video_size(name)) for name in options.video or ("480p-2s", "720p-2s")]:
        latent = latent_size(*size)
        flops = count_flops(latent)
        for label, num_steps, computed in schedules:
            rows.append(
                [
                    name,
                    "x".join(map(str, latent)),
                    f"{flops.computed / 1e12:.2f}",
                    f"{flops.reused / 1e12:.4f}",
                    label,
                    f"{flops.schedule(num_steps, computed) / 1e12:.2f}",
                ]
            )
    print("STDiT3-XL/2, two guidance rows, 300 caption tokens; TFLOP (two per multiply-add)")
    print_table(["video", "latent", "computed step", "reused step", "steps computed", "schedule"], rows)
    return 0


def _demo(options: argparse.Namespace) -> int:
    from adacache.commands.demo import run

    return run(options.out)


def _calibrate(options: argparse.Namespace) -> int:
    from adacache.calibration import Record, calibrate, subject_of, write

    name = SUBJECTS.get(options.model, options.model)
    subject, prompts = subject_of(name, options.num_steps, options.arguments)
    if options.prompts:
        lines = read_text(options.prompts, MEBIBYTE).splitlines()
        prompts = [line.strip() for line in lines if line.strip()]
    needed = options.count + options.held_out
    if len(prompts) < needed:
        raise ValueError(f"--prompts: expected at least {needed} (--count + --held-out), got {len(prompts)}")
    share = options.share
    if share is None and options.error is None and options.like is None:
        share = 0.4
    found = calibrate(
        subject,
        prompts[: options.count],
        prompts[options.count : needed],
        share=share,
        error=options.error,
        like=options.like,
        seed=options.seed,
        probed=options.probed,
        recorder=Record(options.metric_block, options.metric_part, options.tokens),
        say=lambda line: print(line, flush=True),
    )
    write(options.out, found)
    path = str(options.out)
    print(f"written to {path}: adacache.enable(model, {path!r}, num_steps={subject.num_steps})")
    return 0

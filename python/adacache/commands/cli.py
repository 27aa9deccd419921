"""The command `adacache`: doctor, verify, flops, demo, calibrate."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from adacache.commands.table import print_table

SUBJECTS = {"digits": "adacache.digits.subject:subject"}
"""Names of models that `calibrate` takes, and the functions that give them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        print(f"adacache {options.command}: {error}", file=sys.stderr)
        return 2
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="adacache", description="Adaptive caching for video diffusion transformers."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    doctor = commands.add_parser(
        "doctor", help="versions, what was built, which backend each op would use and why"
    )
    doctor.set_defaults(run=_doctor)

    verify = commands.add_parser("verify", help="run recorded cases of the published code again")
    verify.add_argument("directory", help="directory with weights_*.safetensors, CASE.json and CASE.npz")
    verify.add_argument(
        "--backend", action="append", help="backend to run on (repeatable; default: the device's own)"
    )
    verify.add_argument("--cache", action="append", choices=("stack", "sublayer"), help="default: both")
    verify.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    verify.set_defaults(run=_verify)

    flops = commands.add_parser(
        "flops", help="FLOPs of STDiT3-XL/2 per step and per schedule, counted without a GPU"
    )
    flops.add_argument(
        "--video", action="append", help="480p-2s, 720p-2s or FRAMESxHEIGHTxWIDTH (repeatable)"
    )
    flops.add_argument("--num-steps", type=int, default=30)
    flops.add_argument(
        "--computed-steps", type=float, action="append", help="schedules to count (repeatable)"
    )
    flops.add_argument(
        "--trace", action="append", default=[], help="saved trace whose schedule to count (repeatable)"
    )
    flops.set_defaults(run=_flops)

    demo = commands.add_parser(
        "demo", help="generate six clips with and without AdaCache and show the difference"
    )
    demo.add_argument(
        "--out", default="adacache_demo", help="directory of the report (default: adacache_demo)"
    )
    demo.set_defaults(run=_demo)

    calibrate = commands.add_parser(
        "calibrate", help="find a codebook for a model and a sampler from one full run per prompt"
    )
    calibrate.add_argument(
        "model",
        help='"digits", the directory of a saved diffusers pipeline, or "module:function", which takes the '
        "number of steps and returns an adacache.calibration.Subject and its prompts",
    )
    goal = calibrate.add_mutually_exclusive_group()
    goal.add_argument("--share", type=float, help="of the steps that may be computed (default: .4)")
    goal.add_argument(
        "--error", type=float, help="mean relative error of the output that is allowed, as predicted"
    )
    goal.add_argument("--like", help='keep the share that a preset keeps, such as "open-sora/fast"')
    calibrate.add_argument("--prompts", help="file with a prompt per line; some are held out")
    calibrate.add_argument("--count", type=int, default=6, help="prompts to choose on (default: %(default)s)")
    calibrate.add_argument(
        "--held-out", type=int, default=4, help="prompts to judge on (default: %(default)s)"
    )
    calibrate.add_argument(
        "--probed",
        type=int,
        default=2,
        help="of the prompts to choose on, those that are run six times more, to see where in the schedule "
        "reusing harms most (default: %(default)s)",
    )
    calibrate.add_argument("--num-steps", type=int, help="of the sampler")
    calibrate.add_argument(
        "--arguments", default="{}", help="JSON of the pipeline's call, besides the prompt"
    )
    calibrate.add_argument("--metric-block", type=int, help="default: the middle one")
    calibrate.add_argument("--metric-part", help="default: the model's (temporal) self-attention")
    calibrate.add_argument("--tokens", type=int, default=512, help="kept per video (default: %(default)s)")
    calibrate.add_argument("--seed", type=int, default=0)
    calibrate.add_argument(
        "--out", default="adacache.json", help="file for adacache.enable (default: %(default)s)"
    )
    calibrate.set_defaults(run=_calibrate)
    return parser


def _doctor(options: argparse.Namespace) -> int:
    from adacache.commands.doctor import report

    print("\n".join(report()))
    return 0


def _verify(options: argparse.Namespace) -> int:
    import torch

    import adacache_kernels
    from adacache.commands.verify import TOLERANCE, verify

    device = torch.device(options.device)
    backends = options.backend or [
        next(choice.backend for choice in adacache_kernels.backend_report() if choice.device == device.type)
    ]
    outcomes = []
    for outcome in verify(
        options.directory,
        backends=backends,
        caches=options.cache or ("stack", "sublayer"),
        device=options.device,
    ):
        outcomes.append(outcome)
        print(f"\r{len(outcomes)} runs, last: {outcome.case}".ljust(78), end="", file=sys.stderr, flush=True)
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
    from adacache.commands.flops import VIDEOS, count_flops, latent_size
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
    for name in options.video or VIDEOS:
        frames, height, width = VIDEOS[name] if name in VIDEOS else _video(name)
        latent = latent_size(frames, height, width)
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


def _video(text: str) -> tuple[int, int, int]:
    try:
        frames, height, width = (int(part) for part in text.split("x"))
    except ValueError:
        raise ValueError(f"--video: expected 480p-2s, 720p-2s or FRAMESxHEIGHTxWIDTH, got {text!r}") from None
    if min(frames, height, width) < 1:
        raise ValueError(f"--video: expected positive sizes, got {text!r}")
    return frames, height, width


def _demo(options: argparse.Namespace) -> int:
    from adacache.commands.demo import run

    return run(options.out)


def _calibrate(options: argparse.Namespace) -> int:
    import json
    from pathlib import Path

    from adacache.calibration import Record, calibrate, subject_of, write

    subject, prompts = subject_of(
        SUBJECTS.get(options.model, options.model), options.num_steps, json.loads(options.arguments)
    )
    if options.prompts:
        lines = Path(options.prompts).read_text().splitlines()
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
    print(f"written to {options.out}: adacache.enable(model, {options.out!r}, num_steps={subject.num_steps})")
    return 0

# SPDX-License-Identifier: Apache-2.0
"""The command `adacache`: doctor, verify, flops, demo, calibrate, compare, generate, study."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from adacache.checks import printable
from adacache.commands import calibrate, compare, generate, study
from adacache.commands.options import device, real_number, whole_number
from adacache.commands.table import print_table


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

    calibrate.add(commands)
    compare.add(commands)
    generate.add(commands)
    study.add(commands)
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

# SPDX-License-Identifier: Apache-2.0
"""Options of the commands that run a model on prompts: the model, its prompts, steps and seeds."""

from __future__ import annotations

import argparse
from typing import Any

from adacache.commands.options import input_file, json_object, whole_number
from adacache.files import MEBIBYTE, read_text

SUBJECTS = {"digits": "adacache.digits.subject:subject"}
"""Models that are accepted by name, and the function of each."""


def add_subject(command: argparse.ArgumentParser) -> None:
    """Adds the argument `model`."""
    command.add_argument(
        "model",
        help=f"{', '.join(SUBJECTS)}, the folder of a saved diffusers pipeline, or module:function. The "
        "function takes the number of steps, or None, and returns an adacache.calibration.Subject and a list "
        "of prompts",
    )


def add_prompts(command: argparse.ArgumentParser, count: str | None, *, positional: bool = False) -> None:
    """Adds the options that select the prompts, the steps and the seeds.

    Args:
        count: help of --count; None: all prompts are used.
        positional: the prompts are an argument, not an option.
    """
    file = "text file, one prompt per line"
    if positional:
        command.add_argument("prompts", type=input_file, help=file)
    else:
        command.add_argument("--prompts", type=input_file, help=file)
    if count is not None:
        command.add_argument(
            "--count", type=whole_number(1), default=6, help=f"{count} (default: %(default)s)"
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


def subject_and_prompts(options: argparse.Namespace, *, decoded: bool = False) -> tuple[Any, list[Any]]:
    """The subject that the options name, and all prompts: those of --prompts, or the subject's own.

    Args:
        decoded: see `adacache.calibration.subject_of`.
    """
    from adacache.calibration import subject_of

    name = SUBJECTS.get(options.model, options.model)
    subject, prompts = subject_of(name, options.num_steps, options.arguments, decoded=decoded)
    if options.prompts:
        lines = read_text(options.prompts, MEBIBYTE).splitlines()
        prompts = [line.strip() for line in lines if line.strip()]
    return subject, prompts

# SPDX-License-Identifier: Apache-2.0
"""`adacache generate`: a clip and a trace per prompt, by one process, all that torchrun starts, or Ray."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adacache.checks import Check, anything, fields, printable, refuse, text, whole
from adacache.commands.options import real_number, require_packages, whole_number
from adacache.commands.ray_workers import ray_run
from adacache.commands.subjects import add_prompts, add_subject, subject_and_prompts
from adacache.files import MEBIBYTE, read_json, replacing, write_json

DEFAULT_METHOD = "TaylorSeer(interval=3)"
NO_METHOD = "none"
_RESULT = fields(
    {"prompt": text(), "seed": whole(0), "settings": fields({}, others=anything)}, others=anything
)


@dataclass(frozen=True)
class Place:
    """Which of the processes this is, as torchrun states it."""

    rank: int = 0
    size: int = 1
    device: int = 0

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Place:
        """From RANK, WORLD_SIZE and LOCAL_RANK.

        Raises:
            ValueError: one of them is no whole number, or out of range.
        """
        size = _number(environment, "WORLD_SIZE", 1, whole(1))
        return cls(
            _number(environment, "RANK", 0, whole(0, size - 1)),
            size,
            _number(environment, "LOCAL_RANK", 0, whole(0)),
        )

    def own(self, count: int) -> range:
        """The prompts of this process."""
        return range(self.rank, count, self.size)


def _number(environment: Mapping[str, str], name: str, default: int, check: Check) -> int:
    value: Any = environment.get(name, str(default))
    found: int = check(int(value) if value.isdecimal() else value, name)
    return found


def add(commands: Any) -> None:
    """Adds the command to a parser's commands."""
    command = commands.add_parser(
        "generate",
        help="generate a clip per prompt with caching, on all GPUs that torchrun starts a process for",
        description="Writes NUMBER.webp (or NUMBER.safetensors), NUMBER.trace.json and NUMBER.json for each "
        "prompt. Finished prompts are skipped, so the same command continues a run that was stopped. Under "
        "torchrun, the processes share the prompts; with --ray, the workers of a cluster do.",
    )
    add_subject(command)
    add_prompts(command, None, positional=True)
    command.add_argument(
        "--method",
        default=DEFAULT_METHOD,
        help="a class of adacache with its arguments, a preset, or a file of `adacache calibrate` with a "
        "budget, as in `adacache compare`; none: all steps are computed (default: %(default)s)",
    )
    command.add_argument(
        "--latents", action="store_true", help="write the sampler's output as NUMBER.safetensors, not decoded"
    )
    command.add_argument(
        "--fps",
        type=real_number(above=0, most=50),
        default=16.0,
        help="frames per second of the clips (default: %(default)g)",
    )
    command.add_argument("--out", type=Path, required=True, help="folder of the results; is made")
    command.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="run on a Ray cluster: that of ADDRESS or RAY_ADDRESS, or one on this machine",
    )
    command.add_argument(
        "--workers",
        type=whole_number(1),
        help="with --ray: workers, one GPU each (default: all GPUs of the cluster; without a GPU, 1 on CPUs)",
    )
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    require_packages("generate", {"PIL": "pillow", "tqdm": "tqdm"})
    place = Place.of(os.environ)
    if options.ray is not None:
        if place.size > 1:
            raise ValueError(f"--ray: expected one process, got {place.size} of torchrun")
        with ray_run(options, Worker) as (results, finished, messages):
            return report(results, finished, messages, shown=True)
    if options.workers is not None:
        raise ValueError("--workers: expected with --ray only")
    with Worker(options, place) as worker:
        own = [number for number in place.own(len(worker.results.prompts)) if number not in worker.finished]
        ended = ((number, worker.generate(number)) for number in own)
        return report(worker.results, worker.finished, ended, shown=place.rank == 0)


def report(
    results: Results, finished: set[int], messages: Iterable[tuple[int, str | None]], shown: bool
) -> int:
    """Shows the progress; returns the exit status.

    Args:
        finished: prompts that were finished before.
        messages: of the others, as they end: the number of a prompt and its error, if any.
        shown: by this process.
    """
    from tqdm import tqdm

    failed = 0
    with tqdm(
        total=len(results.prompts),
        initial=len(finished),
        unit="prompt",
        disable=not shown,
        mininterval=0.1 if sys.stderr.isatty() else 10.0,
        dynamic_ncols=True,
    ) as bar:
        for number, error in messages:
            if error is not None:
                failed += 1
                print(printable(f"prompt {number + 1}: {error}"), file=sys.stderr)
            bar.update(results.count() - bar.n)
    if failed:
        print(f"{failed} prompts failed; the same command tries them again", file=sys.stderr)
    if shown:
        print(f"{results.count()} of {len(results.prompts)} prompts are in {results.folder}")
    return 1 if failed else 0


class Worker:
    """Generates prompts with one model.

    Attributes:
        results: of the run.
        finished: prompts that were finished at the start.

    Raises:
        ValueError: an option does not fit, or the folder has results of another run.
    """

    def __init__(self, options: argparse.Namespace, place: Place | None = None):
        from adacache.api import enable
        from adacache.commands.comparison import method_of

        _choose_device(place or Place())
        method = None if options.method == NO_METHOD else method_of(options.method, "--method")
        self._subject, prompts = subject_and_prompts(options, decoded=not options.latents)
        if not prompts:
            refuse("prompts", "a file with at least one prompt, because the model has none", options.prompts)
        options.out.mkdir(parents=True, exist_ok=True)
        self.results = Results(options.out, _settings(options, self._subject), prompts, options.seed)
        self.finished = self.results.finished()
        self._fps = None if options.latents else options.fps
        steps, model = self._subject.num_steps, self._subject.model
        self._handle = None if method is None else enable(model, method.policy(steps), num_steps=steps)

    def generate(self, number: int) -> str | None:
        """Writes the result of a prompt; returns the error, if any."""
        begin = time.perf_counter()
        try:
            clip = self._subject.generate(self.results.prompts[number], self.results.seed + number)
            trace = None if self._handle is None else self._handle.trace
            self.results.write(number, clip, trace, time.perf_counter() - begin, self._fps)
        except (ValueError, RuntimeError) as error:
            return str(error)
        return None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        from adacache.api import disable

        if self._handle is not None:
            disable(self._subject.model)


def _choose_device(place: Place) -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(place.device % torch.cuda.device_count())


def _settings(options: argparse.Namespace, subject: Any) -> dict[str, Any]:
    """What the results depend on, besides prompt and seed."""
    return {
        "model": str(Path(options.model).resolve()) if Path(options.model).is_dir() else options.model,
        "method": options.method,
        "num_steps": subject.num_steps,
        "arguments": options.arguments,
        "latents": options.latents,
    }


class Results:
    """The results in a folder. A prompt is finished when its NUMBER.json exists, which is written last.

    Args:
        folder: exists.
        settings: of the run.
        prompts: all of them.
        seed: of the first prompt; the next ones count up.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], prompts: list[Any], seed: int):
        self.folder = folder
        self.settings = settings
        self.prompts = prompts
        self.seed = seed

    def path(self, number: int, suffix: str) -> Path:
        return self.folder / f"{number + 1:05d}{suffix}"

    def count(self) -> int:
        """Prompts that are finished now, by any process."""
        return sum(self.path(number, ".json").exists() for number in range(len(self.prompts)))

    def finished(self) -> set[int]:
        """The finished prompts.

        Raises:
            ValueError: the folder has results of another prompt, seed or setting.
        """
        found = {number for number in range(len(self.prompts)) if self.path(number, ".json").exists()}
        for number in sorted(found):
            path = self.path(number, ".json")
            values = read_json(path, _RESULT, 16 * MEBIBYTE)
            expected = {
                "prompt": str(self.prompts[number]),
                "seed": self.seed + number,
                "settings": self.settings,
            }
            for name, value in expected.items():
                if values[name] != value:
                    raise ValueError(
                        f"--out: {path} has another {name}: {values[name]!r}, this run has {value!r}; use "
                        "another folder"
                    )
        return found

    def write(self, number: int, clip: Any, trace: Any, seconds: float, fps: float | None) -> None:
        """Writes the result of a prompt.

        Args:
            fps: frames per second; None: the tensor is written as it is.

        Raises:
            ValueError: the output is not a clip of pixels.
        """
        if fps is None:
            _write_tensor(self.path(number, ".safetensors"), clip)
        else:
            _write_clip(self.path(number, ".webp"), clip, fps)
        values = {
            "prompt": str(self.prompts[number]),
            "seed": self.seed + number,
            "settings": self.settings,
            "seconds": seconds,
        }
        if trace is not None:
            trace.save(self.path(number, ".trace.json"))
            values |= {"computed_steps": trace.computed_steps, "cache_bytes": trace.cache_bytes}
        write_json(self.path(number, ".json"), values)


def _write_tensor(path: Path, clip: Any) -> None:
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file({"output": clip.detach().cpu().contiguous()}, temporary)


def _write_clip(path: Path, clip: Any, fps: float) -> None:
    """A clip of pixels as an animated WebP."""
    from PIL import Image

    from adacache.commands.comparison import frames

    found = frames(clip)
    if found is None:
        raise ValueError(
            f"output: expected a clip of pixels [1, T, C, H, W], got {list(clip.shape)}; use --latents"
        )
    images = [Image.fromarray(one) for one in (found * 255).round().byte().cpu().numpy()]
    with replacing(path) as temporary:
        images[0].save(
            temporary, save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0, quality=95
        )

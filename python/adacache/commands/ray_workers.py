# SPDX-License-Identifier: Apache-2.0
"""`adacache generate --ray`: one actor per GPU of a Ray cluster. A free actor gets the next prompt."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RESTARTS = 2
"""Times that Ray starts an actor or a prompt again after its process or machine was lost."""


class RayWorker:
    """The actor. It makes its worker in its first call, so that errors reach the caller."""

    def __init__(self, make: Callable[[argparse.Namespace], Any], options: argparse.Namespace):
        self._make = make
        self._options = options
        self._made: Any = None

    def _worker(self) -> Any:
        if self._made is None:
            self._made = self._make(self._options)
        return self._made

    def state(self) -> tuple[Any, set[int]]:
        """The results of the run, and the prompts that were finished."""
        worker = self._worker()
        return worker.results, worker.finished

    def generate(self, number: int) -> str | None:
        """The error of a prompt, if any."""
        found: str | None = self._worker().generate(number)
        return found


@contextmanager
def ray_run(
    options: argparse.Namespace, make: Callable[[argparse.Namespace], Any]
) -> Iterator[tuple[Any, set[int], Iterator[tuple[int, str | None]]]]:
    """Runs the command; all machines of the cluster see the same folders.

    Args:
        make: a worker of `adacache generate`, from the options.

    Returns:
        The results, the prompts that were finished before, and the others as they end, each with its error.

    Raises:
        ImportError: Ray is not installed.
        ValueError: see `adacache.commands.generate.Worker`.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError("--ray: Ray is not installed; pip install 'adacache-kernels[ray]'") from error
    options.out, options.prompts = options.out.resolve(), Path(options.prompts).resolve()
    if Path(options.model).is_dir():
        options.model = str(Path(options.model).resolve())
    started = not ray.is_initialized()
    if started:
        environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(_own_paths())}}
        ray.init(address=options.ray or None, log_to_driver=False, runtime_env=environment)
    try:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        actor = ray.remote(RayWorker).options(
            num_gpus=1 if gpus else 0, num_cpus=1, max_restarts=RESTARTS, max_task_retries=RESTARTS
        )
        first = actor.remote(make, options)
        try:
            results, finished = ray.get(first.state.remote())
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        left = [number for number in range(len(results.prompts)) if number not in finished]
        count = min(options.workers or gpus or 1, len(left))
        actors = [first, *(actor.remote(make, options) for _ in range(count - 1))]
        yield results, finished, _messages(ray, actors, left)
    finally:
        if started:
            ray.shutdown()


def _own_paths() -> list[str]:
    """Folders of modules that are not installed, such as that of a module:function."""
    installed = (sys.prefix, sys.base_prefix)
    paths = [str(Path(path).resolve()) for path in sys.path]
    return [path for path in paths if not path.startswith(installed) and Path(path).is_dir()]


def _messages(ray: Any, actors: list[Any], left: list[int]) -> Iterator[tuple[int, str | None]]:
    """The prompts as they end, with the error of each, if any.

    Args:
        actors: the first one has started. The others get prompts once they have, so that an actor for which
            the cluster has no room delays nothing.
    """
    running: dict[Any, tuple[int | None, Any]] = {one.state.remote(): (None, one) for one in actors[1:]}
    free, waiting = actors[:1], list(left)
    while waiting or any(number is not None for number, _ in running.values()):
        while free and waiting:
            one, number = free.pop(), waiting.pop(0)
            running[one.generate.remote(number)] = number, one
        if not running:
            yield from ((number, "no worker is left") for number in waiting)
            return
        (done,), _ = ray.wait(list(running), num_returns=1)
        ended, one = running.pop(done)
        try:
            error = ray.get(done)
        except ray.exceptions.RayTaskError as raised:
            error = f"{type(raised.cause).__name__}: {raised.cause}"
            free.append(one)
        except ray.exceptions.RayError as lost:  # after its restarts
            error = f"{type(lost).__name__}: {lost}"
        else:
            free.append(one)
        if ended is not None:
            yield ended, error

# SPDX-License-Identifier: Apache-2.0
"""Processes of one gloo group that run functions of `rank_cases`."""

from __future__ import annotations

import importlib
import multiprocessing
import multiprocessing.connection
import sys
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

FOLDERS = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "models")]
GLOO_TIMEOUT = 20.0
"""Seconds that a collective waits for a rank."""
TIMEOUT = 60.0
"""Seconds that a test waits for its ranks."""
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch.distributed", "diffusers.hooks", "diffusers.models", "adacache"])


class RankProcesses:
    """Ranks that stay until the end. One that raises stays usable if all of them do."""

    def __init__(self, size: int):
        self.size = size
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        self._pipes, self.processes = [], []
        for rank in range(size):
            here, there = _CONTEXT.Pipe()
            process = _CONTEXT.Process(target=_serve, args=(there, store, rank, size), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self.processes.append(process)

    def __enter__(self) -> RankProcesses:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self._folder.cleanup()

    def run(self, name: str, /, **arguments: Any) -> list[Any]:
        """What `rank_cases.<name>(rank, size, **arguments)` returns on each rank.

        Raises:
            AssertionError: one of them raised, ended or took too long.
        """
        outcomes = self.outcomes(name, **arguments)
        failed = [text for kind, text in outcomes if kind == "error"]
        assert not failed, "\n".join(failed)
        return [value for _, value in outcomes]

    def outcomes(self, name: str, /, **arguments: Any) -> list[tuple[str, Any]]:
        """("value", value) or ("error", traceback) of each rank; ("ended", None) of one that is gone."""
        for pipe in self._pipes:
            pipe.send((name, arguments))
        found: list[tuple[str, Any]] = []
        for pipe, process in zip(self._pipes, self.processes, strict=True):
            ready = multiprocessing.connection.wait([pipe], TIMEOUT)
            if not ready:
                self.__exit__()
                raise AssertionError(f"{name}: rank {process.name} took more than {TIMEOUT:g} s")
            try:
                found.append(pipe.recv())
            except EOFError:
                found.append(("ended", None))
        return found


def _serve(pipe: Any, store: str, rank: int, size: int) -> None:
    import torch
    import torch.distributed as dist

    sys.path[:0] = [folder for folder in FOLDERS if folder not in sys.path]
    torch.set_num_threads(1)
    dist.init_process_group(
        "cpu:gloo", f"file://{store}", timedelta(seconds=GLOO_TIMEOUT), rank=rank, world_size=size
    )
    cases = importlib.import_module("rank_cases")
    while True:
        try:
            name, arguments = pipe.recv()
        except EOFError:
            return
        try:
            outcome = "value", getattr(cases, name)(rank, size, **arguments)
        except Exception:
            outcome = "error", traceback.format_exc()
        pipe.send(outcome)

# SPDX-License-Identifier: Apache-2.0
"""Plants faults, one at a time, in copies of the sources, and fails if the tests do not catch one of them.

tools/mutations.py lists the faults. A selection of tests must pass without the fault and fail with it. A text
that does not occur exactly once in its file is an error.
Usage: python tools/mutation_check.py [--quick] [--only PATTERN] [--list]
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from built_copy import BuildFailed, build_copy, copy_libraries, copy_sources
from mutations import MUTATIONS, QUICK, SELECTIONS, Mutation, Selection

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "mutation"
QUICK_BUILD = "-DADACACHE_QUICK=ON"  # one instruction set: all share the same sources
TEST_LIMIT = 300  # seconds; a fault may hang a test
SOUND_LIMIT = 900  # seconds, without a fault; a busy machine must not fail the check


@dataclass
class Outcome:
    mutation: Mutation
    caught: bool
    note: str
    seconds: float


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="*", metavar="PATTERN", help="faults whose name or file matches")
    parser.add_argument("--quick", action="store_true", help="only the faults in QUICK")
    parser.add_argument(
        "--list", action="store_true", help="print the faults and check that their texts occur in the files"
    )
    arguments = parser.parse_args()
    mutations = [
        m
        for m in MUTATIONS
        if (fnmatchcase(m.name, arguments.only) or fnmatchcase(m.file, arguments.only))
        and (m.name in QUICK or not arguments.quick)
    ]
    lost = [reason for m in MUTATIONS if (reason := unplaced(m, ROOT))]
    if arguments.list or lost:
        for mutation in mutations:
            print(f"{mutation.file}: {mutation.name} ({mutation.selection})")
        for reason in lost:
            print(f"LOST {reason}")
        return 1 if lost else 0

    started = time.monotonic()
    # One thread for faults that rebuild the CPU library, one for the others.
    compiled = [m for m in mutations if SELECTIONS[m.selection].library]
    others = [m for m in mutations if not SELECTIONS[m.selection].library]
    workers = [Worker("compiled", compiled), Worker("others", others)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    outcomes = [outcome for worker in workers for outcome in worker.outcomes]
    print_table(outcomes)
    broken = any(worker.broken for worker in workers)
    caught = sum(outcome.caught for outcome in outcomes)
    print(f"mutation: {caught} of {len(mutations)} faults caught, {time.monotonic() - started:.0f} s")
    return 0 if caught == len(mutations) and not broken else 1


def unplaced(mutation: Mutation, root: Path) -> str:
    """Why the fault cannot be planted, or ""."""
    path = root / mutation.file
    found = path.read_text().count(mutation.find) if path.exists() else 0
    return (
        "" if found == 1 else f"{mutation.name}: its text occurs {found} times in {mutation.file}, expected 1"
    )


class Worker(threading.Thread):
    """Plants faults one after the other in its copy of the sources."""

    def __init__(self, name: str, mutations: Sequence[Mutation]) -> None:
        super().__init__()
        self.tree = WORK / name
        self.mutations = sorted(mutations, key=lambda m: (m.selection, m.file))
        self.outcomes: list[Outcome] = []
        self.broken: list[str] = []

    def run(self) -> None:
        if not self.mutations:
            return
        try:
            copy_sources(ROOT, self.tree)
            copy_libraries(ROOT, self.tree)
            needed = list(dict.fromkeys(m.selection for m in self.mutations))
            if any(SELECTIONS[name].library for name in needed):
                build_copy(self.tree, QUICK_BUILD)
            for name in needed:
                status, output = run_selection(SELECTIONS[name], self.tree, SOUND_LIMIT)
                if status != 0:
                    self.report(f"selection {name} fails without a fault:\n{output[-3000:]}")
                    return
            for mutation in self.mutations:
                self.outcomes.append(self.plant(mutation))
        except BuildFailed as reason:
            self.report(str(reason))

    def report(self, reason: str) -> None:
        self.broken.append(reason)
        print(f"BROKEN {reason}", flush=True)

    def plant(self, mutation: Mutation) -> Outcome:
        started = time.monotonic()
        selection = SELECTIONS[mutation.selection]
        path = self.tree / mutation.file
        sound = path.read_text()
        path.write_text(sound.replace(mutation.find, mutation.replace))
        try:
            if selection.library:
                build_copy(self.tree, QUICK_BUILD)
            status, output = run_selection(selection, self.tree)
        except BuildFailed as reason:
            self.report(f"{mutation.name}: {reason}")
            status, output = 0, ""
        finally:
            path.write_text(sound)
        caught = status == 1 or status < 0
        if status and not caught:
            self.report(f"{mutation.name}: exit status {status} is not a failed test:\n{output[-3000:]}")
        note = f"terminated by signal {-status}" if status < 0 else failed_test(output)
        outcome = Outcome(mutation, caught, note, time.monotonic() - started)
        print(f"{'caught' if caught else 'MISSED'}: {mutation.name} ({outcome.seconds:.0f} s)", flush=True)
        return outcome


def run_selection(selection: Selection, tree: Path, limit: int = TEST_LIMIT) -> tuple[int, str]:
    """Runs the commands of a selection until one fails. Returns exit status and output.

    Raises:
        BuildFailed: a command of `selection.compile` failed.
    """
    kept = {n: v for n, v in os.environ.items() if not n.startswith(("ADACACHE_", "TRITON_", "PYTEST_"))}
    environment = {**kept, "PYTHONPATH": f"{tree}{os.pathsep}{tree / 'python'}", **selection.environment}
    # The .pyc of the original source may have the same timestamp as the mutated one.
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    output = ""
    for command in [*selection.compile, *selection.commands]:
        words = [sys.executable if word == "python" else word for word in command]
        try:
            done = subprocess.run(
                words, cwd=tree, env=environment, capture_output=True, text=True, timeout=limit
            )
        except subprocess.TimeoutExpired:
            return 1, f"hangs: timeout after {limit} s"
        output += done.stdout + done.stderr
        if done.returncode and command in selection.compile:
            raise BuildFailed(f"{words[0]} failed:\n{output[-3000:]}")
        if done.returncode:
            return done.returncode, output
    return 0, output


def failed_test(output: str) -> str:
    """The first failed test or case in the output."""
    for pattern in (r"^(?:FAILED|ERROR) (\S+)", r"^(hangs: .*)", r"(data race)", r"^(.*FAULT.*|.*failed.*)$"):
        if match := re.search(pattern, output, re.MULTILINE):
            return match.group(1)[:90]
    return ""


def print_table(outcomes: Sequence[Outcome]) -> None:
    rows = [("fault", "file", "", "s", "by")]
    for o in outcomes:
        mark = "caught" if o.caught else "MISSED"
        rows.append((o.mutation.name, o.mutation.file, mark, f"{o.seconds:.0f}", o.note))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    print()
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    sys.exit(main())

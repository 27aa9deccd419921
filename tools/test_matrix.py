# SPDX-License-Identifier: Apache-2.0
"""Runs the op and layer tests under several torch releases, each with its Triton, and prints a table. All
releases use the compiled libraries of this tree.

python tools/test_matrix.py [--torch torch==2.11.0 ...] [--tests tests/ops tests/layer] [--options="-n 4"]

Each release has a virtual environment in build/matrix, which later runs reuse.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "matrix"
NEWEST = "newest"
#: The oldest supported torch, the one of the limits on generated code, and the newest.
RELEASES = ("torch==2.11.0", "torch==2.14.1", NEWEST)
TESTS = ("tests/ops", "tests/layer")
PROBE = """
import json
from importlib.metadata import version
import torch, adacache_kernels
libraries = adacache_kernels.build_info()["libraries"]
print(json.dumps({
    "versions": {name: version(name) for name in ("torch", "triton", "numpy", "diffusers")},
    "missing": [libraries[name]["reason"] for name in ("cpu", "engine") if libraries[name]["reason"]],
}))
"""


@dataclass
class Outcome:
    asked: str
    versions: dict[str, str] = field(default_factory=dict)
    tests: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch", nargs="+", default=RELEASES, help=f"requirements; default: {RELEASES}")
    parser.add_argument("--tests", nargs="+", default=TESTS, help=f"files or folders; default: {TESTS}")
    parser.add_argument("--options", default="", help="further options for pytest")
    arguments = parser.parse_args()
    outcomes = [run(asked, arguments.tests, shlex.split(arguments.options)) for asked in arguments.torch]
    print("\n" + table(outcomes, arguments.tests))
    for outcome in outcomes:
        for fault in outcome.faults:
            print(f"{outcome.asked}: {fault}")
    return 1 if any(outcome.faults for outcome in outcomes) else 0


def run(asked: str, tests: list[str], options: list[str]) -> Outcome:
    outcome = Outcome(asked)
    try:
        python = environment(newest() if asked == NEWEST else asked)
        facts = json.loads(call([str(python), "-c", PROBE]).splitlines()[-1])
    except LookupError as error:
        outcome.faults.append(str(error))
        return outcome
    outcome.versions, outcome.faults = facts["versions"], facts["missing"]
    for selected in tests:
        started = time.monotonic()
        command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, selected]
        print(f"\n== torch {outcome.versions['torch']}: {selected}", flush=True)
        done = subprocess.run(command, cwd=ROOT, env=variables(), stdout=subprocess.PIPE, text=True)
        print(done.stdout[-20000:], flush=True)
        closing = (done.stdout.strip().splitlines() or ["no output"])[-1].strip("= ")
        outcome.tests[selected] = re.sub(r" in [\d.]+s.*", "", closing)
        outcome.tests[selected] += f" ({time.monotonic() - started:.0f} s)"
        if done.returncode:
            outcome.faults += re.findall(r"^(?:FAILED|ERROR) \S+", done.stdout, re.MULTILINE) or [closing]
    return outcome


def environment(asked: str) -> Path:
    """The Python of a virtual environment with this torch and the test requirements."""
    folder = WORK / re.sub(r"[^\w.+-]+", "-", asked.replace("==", "-"))
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        call([sys.executable, "-m", "venv", str(folder)])
        print(f"installing {asked} in {folder.relative_to(ROOT)}", flush=True)
        call([str(python), "-m", "pip", "install", "-q", asked, *requirements()])
        (folder / "complete").touch()
    return python


def requirements() -> list[str]:
    """The requirements of the package and its tests without torch, from the metadata of the installed
    package."""
    listed = [Requirement(text) for text in metadata.requires("adacache-kernels") or []]
    wanted = [
        requirement
        for requirement in listed
        if requirement.name not in ("torch", "adacache-kernels")
        and (
            requirement.marker is None
            or any(requirement.marker.evaluate({"extra": extra}) for extra in ("demo", "test"))
        )
    ]
    return [f"{requirement.name}{requirement.specifier}" for requirement in wanted]


def newest() -> str:
    listed = call([sys.executable, "-m", "pip", "index", "versions", "torch"])
    found = re.match(r"torch \(([^)]+)\)", listed)
    if found is None:
        raise LookupError("pip lists no torch")
    return f"torch=={found[1]}"


def variables() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")])}


def call(command: list[str]) -> str:
    done = subprocess.run(command, cwd=ROOT, env=variables(), capture_output=True, text=True)
    if done.returncode:
        raise LookupError(
            f"{shlex.join(command)[:200]}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}"
        )
    return done.stdout


def table(outcomes: list[Outcome], tests: list[str]) -> str:
    names = ("torch", "triton", "numpy", "diffusers")
    rows = [(*names, *tests)]
    for outcome in outcomes:
        versions = [outcome.versions.get(name, "-") for name in names]
        rows.append((*versions, *(outcome.tests.get(selected, "-") for selected in tests)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
    )


if __name__ == "__main__":
    sys.exit(main())

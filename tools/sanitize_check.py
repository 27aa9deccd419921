"""Runs compiled code under sanitizers: the CUDA bodies on the host, and the CPU library with the ops' tests.

The CPU library is compiled in copies of the sources, once for the address and undefined-behaviour sanitizers
and once for ThreadSanitizer. Each is first shown to see a fault.
Usage: python tools/sanitize_check.py [--only bodies|address|thread]
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from built_copy import BuildFailed, build_copy, copy_sources

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "sanitize"
BODIES = "bodies"


@dataclass(frozen=True)
class Sanitizer:
    """How a sanitized library is loaded into Python, and what proves that it is watched."""

    name: str
    option: str  # of the compiler
    runtime: str
    settings: dict[str, str]
    control: str  # a program with a fault
    report: str  # what is then printed
    tests: list[str]


SANITIZERS = [
    Sanitizer(
        "address",
        "address,undefined",
        "libasan.so",
        # What Python and torch keep until they end is no leak of ours.
        {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1"},
        """
import numpy, torch, adacache_kernels
few = numpy.zeros(1000, dtype=numpy.float32)
past_the_end = torch.from_numpy(numpy.lib.stride_tricks.as_strided(few, (1, 300, 4), (4800, 16, 4)))
adacache_kernels.reuse_residual(torch.zeros(1, 300, 4), past_the_end)
""",
        "heap-buffer-overflow",
        ["tests/ops", "-k", "cpu"],
    ),
    Sanitizer(
        "thread",
        "thread",
        "libtsan.so",
        # Only code that was compiled for it is watched: neither Python nor torch.
        {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1:halt_on_error=1", "OMP_NUM_THREADS": "4"},
        """
import threading, torch, adacache_kernels
x = torch.ones(2, 512, 256)
out = torch.empty_like(x)

def write():
    for _ in range(100):
        adacache_kernels.reuse_residual(x, x, out=out)

team = [threading.Thread(target=write) for _ in range(2)]
for thread in team:
    thread.start()
for thread in team:
    thread.join()
""",
        "data race",
        ["tests/ops", "-k", "cpu"],
    ),
]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [BODIES, *(sanitizer.name for sanitizer in SANITIZERS)]
    parser.add_argument("--only", choices=names)
    asked = parser.parse_args().only
    faults = []
    for name in [asked] if asked else names:
        started = time.monotonic()
        sanitizer = next((one for one in SANITIZERS if one.name == name), None)
        fault = check_bodies() if sanitizer is None else check_library(sanitizer)
        print(f"sanitize: {name}: {fault or 'passed'}, {time.monotonic() - started:.0f} s\n", flush=True)
        faults += [fault] if fault else []
    return 1 if faults else 0


def check_bodies() -> str:
    """The CUDA bodies, all cases under all three sanitizers."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels_on_host"]
    environment = {**os.environ, "ADACACHE_HOST_FULL": "1"}
    done = subprocess.run([*command, "-o", "timeout=1800"], cwd=ROOT, env=environment)
    return f"pytest ended with exit status {done.returncode}" if done.returncode else ""


def check_library(sanitizer: Sanitizer) -> str:
    """What is wrong, "" if nothing is."""
    tree = WORK / sanitizer.name
    copy_sources(ROOT, tree)
    try:
        build_copy(tree, f"-DADACACHE_QUICK=ON -DADACACHE_SANITIZE={sanitizer.option}")
    except BuildFailed as error:
        return str(error)
    preloaded = [library(sanitizer.runtime), library("libstdc++.so")]
    if missing := [name for name in preloaded if not Path(name).is_file()]:
        return f"the compiler has no {missing[0]}"
    environment = {
        **os.environ,
        **sanitizer.settings,
        "LD_PRELOAD": " ".join(preloaded),
        "PYTHONPATH": f"{tree}{os.pathsep}{tree / 'python'}",
        "CUDA_VISIBLE_DEVICES": "",
    }
    # Old ThreadSanitizers and new kernels disagree on how far addresses are randomised.
    setarch = shutil.which("setarch")
    python = [*([setarch, "-R"] if setarch else []), sys.executable]
    control = subprocess.run(
        [*python, "-c", sanitizer.control], cwd=tree, env=environment, capture_output=True, text=True
    )
    if control.returncode == 0 or not re.search(sanitizer.report, control.stderr):
        return f"it does not see a planted fault:\n{control.stderr[-2000:]}"
    ignored = ["--ignore-glob=*test_triton*", "--ignore-glob=*test_backends*"]
    command = [*python, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *ignored, *sanitizer.tests]
    done = subprocess.run([*command, "-o", "timeout=1800"], cwd=tree, env=environment)
    return f"pytest ended with exit status {done.returncode}" if done.returncode else ""


def library(name: str) -> str:
    compiler = os.environ.get("CXX", "g++")
    done = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())

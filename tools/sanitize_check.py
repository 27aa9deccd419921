# SPDX-License-Identifier: Apache-2.0
"""Runs compiled code under sanitizers: the CUDA bodies on the host, and the CPU library with the op tests.

The CPU library is compiled in copies of the sources, once for the address and undefined-behaviour sanitizers
and once for ThreadSanitizer. Each build must first report a planted fault. Parts run in parallel.
Usage: python tools/sanitize_check.py [--full] [--only bodies|address|thread]
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from built_copy import BuildFailed, build_copy, copy_sources

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "sanitize"
BODIES = "bodies"
#: Without --full: every SHARE-th case of each test (a prime, so that all dtypes and layouts occur), without
#: the tests that run no kernel or the same kernels again.
SHARE = 7
LEFT_OUT = "bad_input or compile or opcheck or requires_grad"


@dataclass(frozen=True)
class Sanitizer:
    """Options of a sanitizer, and a control program that proves it is active."""

    name: str
    option: str  # of the compiler
    runtime: str
    settings: dict[str, str]
    control: str  # a Python program with a fault
    report: str  # a pattern of the expected report


SANITIZERS = [
    Sanitizer(
        "address",
        "address,undefined",
        "libasan.so",
        # Python and torch do not free all memory at exit.
        {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1"},
        """
import numpy, torch, adacache_kernels
few = numpy.zeros(1000, dtype=numpy.float32)
past_the_end = torch.from_numpy(numpy.lib.stride_tricks.as_strided(few, (1, 300, 4), (4800, 16, 4)))
adacache_kernels.reuse_residual(torch.zeros(1, 300, 4), past_the_end)
""",
        "heap-buffer-overflow",
    ),
    Sanitizer(
        "thread",
        "thread",
        "libtsan.so",
        # Python and torch are not instrumented.
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
    ),
]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [BODIES, *(sanitizer.name for sanitizer in SANITIZERS)]
    parser.add_argument("--only", choices=names)
    parser.add_argument("--full", action="store_true", help="all cases; takes about 15 minutes")
    arguments = parser.parse_args()

    def check(name: str) -> str:
        started = time.monotonic()
        sanitizer = next((one for one in SANITIZERS if one.name == name), None)
        fault = (
            check_bodies(arguments.full) if sanitizer is None else check_library(sanitizer, arguments.full)
        )
        print(f"sanitize: {name}: {fault or 'passed'}, {time.monotonic() - started:.0f} s", flush=True)
        return fault

    # The libraries first: they take the longest.
    asked = [arguments.only] if arguments.only else [*reversed(names)]
    with ThreadPoolExecutor(max(2, (os.cpu_count() or 1) // 2)) as jobs:
        return 1 if any(list(jobs.map(check, asked))) else 0


def check_bodies(full: bool) -> str:
    """Runs the CUDA bodies under all three sanitizers. Returns the fault, or ""."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "toolchain"]
    command += ["tests/kernels_on_host"]
    environment = {**os.environ, "ADACACHE_HOST_FULL": "1" if full else "0"}
    return run_tests([*command, "-o", "timeout=1800"], ROOT, environment)


def run_tests(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    """Runs pytest and prints its output. Returns the fault, or ""."""
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    output = done.stdout.decode(errors="replace")
    print(output if done.returncode else "\n".join(output.splitlines()[-1:]), flush=True)
    return f"pytest ended with exit status {done.returncode}" if done.returncode else ""


def check_library(sanitizer: Sanitizer, full: bool) -> str:
    """Runs the op tests on the sanitized CPU library. Returns the fault, or ""."""
    tree = WORK / sanitizer.name
    copy_sources(ROOT, tree)
    try:
        build_copy(tree, f"-DADACACHE_QUICK=ON -DADACACHE_SANITIZE={sanitizer.option}")
    except BuildFailed as error:
        return str(error)
    preloaded = [library(sanitizer.runtime), library("libstdc++.so")]
    if missing := [name for name in preloaded if not Path(name).is_file()]:
        return f"{missing[0]}: not found by the compiler"
    environment = {
        **os.environ,
        **sanitizer.settings,
        "LD_PRELOAD": " ".join(preloaded),
        "PYTHONPATH": os.pathsep.join(str(tree / name) for name in ("", "python", "tests/ops")),
        "CUDA_VISIBLE_DEVICES": "",
    }
    # Old ThreadSanitizers do not support the address randomization of new kernels.
    setarch = shutil.which("setarch")
    python = [*([setarch, "-R"] if setarch else []), sys.executable]
    control = subprocess.run(
        [*python, "-c", sanitizer.control], cwd=tree, env=environment, capture_output=True, text=True
    )
    if control.returncode == 0 or not re.search(sanitizer.report, control.stderr):
        return f"the planted fault was not reported:\n{control.stderr[-2000:]}"
    ignored = ["--ignore-glob=*test_triton*", "--ignore-glob=*test_backends*"]
    command = [*python, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *ignored, "tests/ops", "-k"]
    if full:
        environment["ADACACHE_ALL_CASES"] = "1"
        command.append("cpu")
    else:
        environment["ADACACHE_TEST_EVERY"] = str(SHARE)
        command += [f"cpu and not ({LEFT_OUT})", "-p", "every_nth"]
    return run_tests([*command, "-o", "timeout=1800"], tree, environment)


def library(name: str) -> str:
    compiler = os.environ.get("CXX", "g++")
    done = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels in the interpreter on CPU tensors: random cases and the tests of this folder, in a
subprocess."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.toolchain

FOLDER = Path(__file__).resolve().parent
#: Excluded: not about kernels, too large, or starting subprocesses.
OTHERS = ("test_backends", "test_large", "test_triton")
FILES = sorted(path for path in FOLDER.glob("test_*.py") if not path.name.startswith(OTHERS))
PROPERTY = FOLDER.parent / "property" / "test_ops.py"

#: Older interpreters (such as Triton 3.6) use an array as a loop bound, which NumPy >= 2.4 rejects.
PROBE = """
import torch, triton

@triton.jit
def loop_kernel(bound):
    for _ in range(bound):
        pass

loop_kernel[(1,)](2)
"""


@pytest.mark.timeout(1800)
def test_every_nth_case_in_the_interpreter(tmp_path: Path) -> None:
    """`every` is a prime, so that all dtypes, layouts and other parameters occur."""
    run_in_the_interpreter(tmp_path, random_cases=8, every=23, at_least=200)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_all_cases_in_the_interpreter(tmp_path: Path) -> None:
    run_in_the_interpreter(tmp_path, random_cases=200, every=1, at_least=3000)


def test_partial_sums_are_reduced_per_video() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("the package triton is not installed")
    script = FOLDER / "interpret_sums.py"
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    if "only 0-dimensional arrays can be converted to Python scalars" in done.stderr:
        pytest.skip("the interpreter of this Triton cannot run loops under NumPy 2.4 or later")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "shapes of partial sums passed" in done.stdout


def run_in_the_interpreter(folder: Path, *, random_cases: int, every: int, at_least: int) -> None:
    """Runs the tests on the Triton backend. at_least: minimum number of tests, to detect a failed
    collection."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("the package triton is not installed")
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "ADACACHE_TEST_BACKEND": "triton",
        "ADACACHE_PROPERTY": str(random_cases),
        "ADACACHE_TEST_EVERY": str(every),
        **({"ADACACHE_ALL_CASES": "1"} if every == 1 else {}),
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(FOLDER), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    }
    probe_file = folder / "probe.py"
    probe_file.write_text(PROBE)
    probe = subprocess.run([sys.executable, str(probe_file)], env=environment, capture_output=True, text=True)
    if "only 0-dimensional arrays can be converted to Python scalars" in probe.stderr:
        pytest.skip("the interpreter of this Triton cannot run loops under NumPy 2.4 or later")
    assert probe.returncode == 0, probe.stderr
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "every_nth"]
    command += ["-W", "ignore::RuntimeWarning", *map(str, [PROPERTY, *FILES])]
    session = subprocess.run(command, env=environment, cwd=FOLDER.parents[1], capture_output=True, text=True)
    assert session.returncode == 0, session.stdout[-8000:] + session.stderr[-4000:]
    closing = session.stdout.strip().splitlines()[-1]
    print(closing)
    assert "skipped" not in closing, closing
    passed = re.search(r"(\d+) passed", closing)
    assert passed is not None, closing
    assert int(passed[1]) >= at_least, closing

"""The Triton kernels, run by Triton's interpreter on CPU tensors: the tests of this folder again, in a
process of their own."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent
PROPERTY = FOLDER.parent / "property" / "test_ops.py"


#: Older interpreters take an array of one element for a loop bound, which NumPy refuses from 2.4 on (seen:
#: Triton 3.6).
PROBE = """
import torch, triton

@triton.jit
def loop_kernel(bound):
    for _ in range(bound):
        pass

loop_kernel[(1,)](2)
"""


@pytest.mark.timeout(1800)
def test_kernels_in_the_interpreter(tmp_path: Path) -> None:
    """Random cases of every op, and what all ops have in common."""
    files = [PROPERTY, FOLDER / "test_every_op.py", FOLDER / "test_linear_gated_residual_meter.py"]
    run_in_the_interpreter(files, tmp_path, cases=12, at_least=600)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_all_cases_in_the_interpreter(tmp_path: Path) -> None:
    files = [path for path in FOLDER.glob("test_*.py") if "backend: str" in path.read_text()]
    files = [path for path in files if path.stem not in ("test_backends", "test_every_op", "test_large")]
    run_in_the_interpreter([PROPERTY, *sorted(files)], tmp_path, cases=200, at_least=2000)


def run_in_the_interpreter(files: list[Path], folder: Path, *, cases: int, at_least: int) -> None:
    """Run tests on the Triton backend; with fewer than `at_least` a collection that went wrong would pass for
    a success."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("the package triton is not installed")
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "ADACACHE_TEST_BACKEND": "triton",
        "ADACACHE_PROPERTY": str(cases),
        "CUDA_VISIBLE_DEVICES": "",
    }
    probe_file = folder / "probe.py"
    probe_file.write_text(PROBE)
    probe = subprocess.run([sys.executable, str(probe_file)], env=environment, capture_output=True, text=True)
    if "only 0-dimensional arrays can be converted to Python scalars" in probe.stderr:
        pytest.skip("the interpreter of this Triton cannot run loops under NumPy 2.4 or later")
    assert probe.returncode == 0, probe.stderr
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    command += ["-k", "not where_triton_cannot_run"]
    command += map(str, files)
    session = subprocess.run(command, env=environment, cwd=FOLDER.parents[1], capture_output=True, text=True)
    assert session.returncode == 0, session.stdout[-8000:] + session.stderr[-4000:]
    closing = session.stdout.strip().splitlines()[-1]
    print(closing)
    passed = re.search(r"(\d+) passed", closing)
    assert passed is not None, closing
    assert int(passed[1]) >= at_least, closing

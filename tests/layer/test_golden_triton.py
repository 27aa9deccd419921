"""The recorded runs on the Triton kernels, run by Triton's interpreter in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_golden import CASES, one_case

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is missing"
)


def verify_in_interpreter(directory: Path, *options: str) -> str:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "adacache", "verify", str(directory), "--backend", "triton", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["fast30_tattn_moreg_strides", "fast30_image_conditioned"])
def test_recorded_case(name: str, tmp_path: Path) -> None:
    out = verify_in_interpreter(one_case(tmp_path, name), "--cache", "stack")
    assert "2 of 2 runs are as recorded" in out
    assert "triton" in out


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", CASES)
def test_every_recorded_case_with_both_caches(name: str, tmp_path: Path) -> None:
    assert "3 of 3 runs are as recorded" in verify_in_interpreter(one_case(tmp_path, name))

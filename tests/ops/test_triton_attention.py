# SPDX-License-Identifier: Apache-2.0
"""The attention kernels in Triton without a GPU: run in the interpreter on CPU tensors in a subprocess, and
compiled ahead of time."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from generated_code import expect_of_compiler

pytestmark = pytest.mark.toolchain

FOLDER = Path(__file__).resolve().parent
FILES = ("test_fused_qk_norm_rope.py", "test_temporal_attention.py")
#: The minimum number of tests in the sample (tests/conftest.py), to detect a failed collection.
AT_LEAST = 290
ARCHITECTURES = (90, 80, 100, 120)  # all cases for the first only
#: Maximum shared memory per block on the smallest supported GPUs (sm_86, sm_89, sm_120).
SHARED_BYTES = 99 * 1024


@pytest.mark.timeout(1800)
def test_kernels_in_the_interpreter() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("the package triton is not installed")
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "ADACACHE_TEST_BACKEND": "triton",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    # dtype2 is float16, which has the same code paths as bfloat16.
    command += ["-k", "not dtype2", *(str(FOLDER / name) for name in FILES)]
    session = subprocess.run(command, env=environment, cwd=FOLDER.parents[1], capture_output=True, text=True)
    if "only 0-dimensional arrays can be converted to Python scalars" in session.stdout:
        pytest.skip("the interpreter of this Triton cannot run loops under NumPy 2.4 or later")
    assert session.returncode == 0, session.stdout[-8000:] + session.stderr[-4000:]
    closing = session.stdout.strip().splitlines()[-1]
    print(closing)
    assert "skipped" not in closing, closing
    passed = re.search(r"(\d+) passed", closing)
    assert passed is not None, closing
    assert int(passed[1]) >= AT_LEAST, closing


@cache
def compiled() -> list[dict[str, Any]]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("the package triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(FOLDER / "compile_attention_kernels.py"), *map(str, ARCHITECTURES)]
    run = subprocess.run(command, env=environment, cwd=FOLDER.parents[1], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-8000:]
    results: list[dict[str, Any]] = json.loads(run.stdout)
    return results


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_fits(architecture: int) -> None:
    """No spills; registers and shared memory fit every GPU."""
    mine = [result for result in compiled() if result["architecture"] == architecture]
    assert {result["kernel"] for result in mine} == {"temporal_attention_kernel", "fused_qk_norm_rope_kernel"}
    for result in mine:
        expect_of_compiler(result["spill_bytes"] == 0, f"expected no spills: {result}")
        fits = result["shared_bytes"] <= SHARED_BYTES and result["registers"] * 32 * result["warps"] <= 65536
        expect_of_compiler(fits, f"expected at least one block per multiprocessor: {result}")


@pytest.mark.timeout(1800)
def test_half_precision_uses_tensor_cores_and_wide_accesses() -> None:
    seen = 0
    for result in compiled():
        if result["kernel"] == "temporal_attention_kernel" and not result["case"].startswith("fp32"):
            expect_of_compiler(result["tensor_core_products"] > 0, f"expected tensor cores: {result}")
            if "rope=2" not in result["case"]:  # halves of 36 channels are aligned to 8 bytes
                expect_of_compiler(result["wide_loads"] > 0, f"expected 16-byte loads: {result}")
            seen += 1
    assert seen >= 12

# SPDX-License-Identifier: Apache-2.0
"""Whole requests on the Triton kernels, in Triton's interpreter and a subprocess."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_golden import CASES, one_case

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


FOLDER = Path(__file__).resolve().parent
FEW_STEPS = """
import adacache, adacache_kernels, torch
from adacache.models.stdit3 import STDiT3, STDiT3Config
from models import denoise, inputs, relative_error

torch.manual_seed(0)
config = STDiT3Config(depth=1, hidden_size=96, num_heads=4, caption_channels=32, model_max_length=12)
model, values = STDiT3(config).eval(), inputs(1, frames=3)
results, schedules = [], []
for backend in ("reference", "triton"):
    handle = adacache.enable(model, adacache.AdaCache(codebook={9.0: 2}), num_steps=5)
    with adacache_kernels.use_backend(backend):
        results.append(denoise(model, values, 5))
    schedules.append(handle.trace.computed_steps)
    adacache.disable(model)
assert schedules == [[1, 2, 4, 5]] * 2, schedules
print(relative_error(*results))
"""


def run_in_interpreter(*arguments: str) -> str:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(FOLDER), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.toolchain
def test_a_few_steps() -> None:
    assert 0 <= float(run_in_interpreter("-c", FEW_STEPS)) < 1e-5


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", CASES)
def test_recorded_case(name: str, tmp_path: Path) -> None:
    command = ["-m", "adacache", "verify", str(one_case(tmp_path, name)), "--backend", "triton"]
    assert "2 of 2 runs are as recorded" in run_in_interpreter(*command, "--cache", "stack")

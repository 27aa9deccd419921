# SPDX-License-Identifier: Apache-2.0
"""The example of docs/several_gpus.md, as a user starts it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo")
def test_the_digit_model_on_two_processes() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*torchrun, str(ROOT / "examples" / "several_gpus" / "digits.py")],
        capture_output=True,
        text=True,
        timeout=240,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        },
    )
    assert run.returncode == 0, run.stderr
    schedules = re.findall(r"process(?:es)?: (\[.*\])", run.stdout)
    assert len(schedules) == 2
    assert schedules[0] == schedules[1]
    computed = len(schedules[0].split(","))
    assert 4 < computed < 30
    assert f"'reductions': {computed}" in run.stdout
    (difference,) = re.findall(r"largest difference: (.*)", run.stdout)
    assert float(difference) < 1e-4

# SPDX-License-Identifier: Apache-2.0
"""Importing the packages does no GPU work: no context, no device query, no kernel compilation."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tool_loading import ROOT

#: Replaces every entry point of torch to the device before the package is imported.
GUARD = """
import sys, torch

def refuse(*arguments, **keywords):
    raise SystemExit("the import accessed the GPU")

for name in ("_cuda_init", "_cuda_getDeviceCount", "_cuda_getDevice", "_cuda_setDevice"):
    setattr(torch._C, name, refuse)
for name in ("_lazy_init", "init", "is_available", "device_count", "current_device", "synchronize"):
    setattr(torch.cuda, name, refuse)
"""


def after_guard(code: str) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'python'}", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", GUARD + code]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("package", ["adacache_kernels", "adacache", "adacache_kernels.triton"])
def test_import_does_not_access_the_gpu(package: str) -> None:
    if package.endswith("triton"):
        pytest.importorskip("triton", reason="triton is not installed")
    done = after_guard(f"import {package}\nassert not torch.cuda.is_initialized()\nprint('imported')")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "imported"


@pytest.mark.parametrize("work", ["torch.zeros(1, device='cuda')", "torch.cuda.is_available()"])
def test_guard_detects_gpu_access(work: str) -> None:
    done = after_guard(work)
    assert done.returncode != 0
    assert "accessed the GPU" in done.stderr or "not compiled with CUDA" in done.stderr


@pytest.mark.slow
def test_import_adds_less_than_100_ms() -> None:
    """To that of torch, in time of the processor: other processes do not count."""
    code = (
        "import time, torch; before = time.process_time(); import adacache_kernels; "
        "print(time.process_time() - before)"
    )
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'python'}", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", code]
    seconds = [
        float(subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True).stdout)
        for _ in range(3)
    ]
    print(seconds)
    assert min(seconds) < 0.1

"""The Triton kernels, compiled for GPUs that need not be there: no spills, no fused roundings, no element
handed between threads."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parent
ARCHITECTURES = (90, 80, 100, 120)  # the first with every configuration


@cache
def compiled() -> list[dict[str, Any]]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("the package triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(FOLDER / "compile_triton_kernels.py"), *map(str, ARCHITECTURES)]
    run = subprocess.run(command, env=environment, cwd=FOLDER.parents[1], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-8000:]
    results: list[dict[str, Any]] = json.loads(run.stdout)
    return results


@pytest.mark.timeout(900)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles(architecture: int) -> None:
    mine = [result for result in compiled() if result["architecture"] == architecture]
    kernels = {result["kernel"] for result in mine}
    assert kernels == {
        "gated_residual_meter_kernel",
        "residual_meter_kernel",
        "reuse_residual_kernel",
        "combine_sums_kernel",
        "decide_kernel",
    }
    for result in mine:
        assert result["cubin_bytes"] > 0, result
        assert result["spill_bytes"] == 0, result
        assert result["fused_multiply_adds"] == 0, result


def test_an_element_is_read_and_written_by_one_thread() -> None:
    """Where everything is aligned, gated_residual_meter relies on it: old is read and the new residual
    written without a barrier.

    Where it is not, the kernel has a barrier in between.
    """
    aligned, barred = 0, 0
    for result in compiled():
        if result["kernel"] != "gated_residual_meter_kernel":
            continue
        if "aligned=True" in result["case"]:
            assert result["layout_conversions"] == 0, result
            aligned += 1
        else:
            twin = next(
                other
                for other in compiled()
                if other["case"] == result["case"].replace("aligned=False", "aligned=True")
                and (other["kernel"], other["architecture"]) == (result["kernel"], result["architecture"])
            )
            assert result["barriers"] > twin["barriers"], result
            barred += 1
    assert aligned >= 10
    assert barred >= 10


def test_constants_of_the_decision_keep_their_precision() -> None:
    """Triton takes floats for float32 unless told otherwise; the rule is float64 throughout."""
    decisions = [result for result in compiled() if result["kernel"] == "decide_kernel"]
    assert decisions
    for result in decisions:
        assert result["float32_values"] == 0, result

# SPDX-License-Identifier: Apache-2.0
"""The NumPy code behind `adacache_kernels.simulate` against the compiled module."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import pytest

import adacache_kernels
from adacache_kernels import _engine_numpy as plain
from adacache_kernels import simulate

FOLDER = Path(adacache_kernels.__file__).resolve().parent
GOOD: dict[str, Any] = {
    "distances": [[[0.5] * 2] * 2],
    "motion": [[0.5] * 2],
    "thresholds": [[0.1, 0.2]],
    "rates": [[2.0, 1.0]],
}


@pytest.fixture
def compiled() -> ModuleType:
    if not adacache_kernels.build_info()["libraries"]["engine"]["loaded"]:
        pytest.skip("the compiled engine is not built for this Python")
    return simulate._engine()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rule", [0, 1])
@pytest.mark.parametrize("motion_on", [False, True])
def test_schedules_are_equal(compiled: ModuleType, seed: int, rule: int, motion_on: bool) -> None:
    random = numpy.random.default_rng(seed)
    print(f"seed {seed}")
    books, videos, steps, entries = 5, 3, 25, 4
    distances = random.uniform(0.02, 1.0, (videos, steps, steps))
    distances[0, :, 7] = numpy.nan
    motion = random.uniform(0.3, 0.5, (videos, steps))
    motion[1, 9] = numpy.inf
    thresholds = numpy.sort(random.uniform(0.01, 0.6, (books, entries)))
    rates = numpy.sort(random.integers(1, 9, (books, entries)).astype(float))[:, ::-1]
    call = (distances, motion, thresholds, rates, rule, motion_on, 3, 20)
    expected = compiled.simulate(*call)
    given = plain.simulate(*call)
    for one, other in zip(given, expected, strict=True):
        assert one.dtype == other.dtype
        assert numpy.array_equal(one, other)
    assert 0.1 < expected[0].mean() < 0.9


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("metric", [0, 1, 2])
@pytest.mark.parametrize("rule", [0, 1])
def test_states_are_equal(compiled: ModuleType, seed: int, metric: int, rule: int) -> None:
    """Over a request with two sites, including sums that are not finite. `pow` may differ in the last bit."""
    random = numpy.random.default_rng(seed)
    print(f"seed {seed}")
    states = [module.initial_state(3, 2, rule) for module in (compiled, plain)]
    assert numpy.array_equal(*states, equal_nan=True)
    for step in range(1, 13):
        for site in (0, 1):
            sums = random.uniform(0.1, 1.0, (3, 11))
            if step == 6:
                sums[0, 0] = sums[0, 3] = sums[0, 6] = numpy.nan
            thresholds, rates = [0.2, 0.6, 1.5], [4.0, 2.0, 1.0]
            place = (step, 12, site, 8, [1, 2], metric, rule, 96.0, 2, 10)
            for module, state in zip((compiled, plain), states, strict=True):
                module.decide(sums, state, thresholds, rates, *place, 0.5, 1.5, 1.0, 3.0)
            numpy.testing.assert_allclose(states[1], states[0], rtol=1e-14, atol=0)
    assert (states[0][:, 0] == 12).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"distances": [[0.0]]},
        {"motion": [[0.0] * 3]},
        {"thresholds": [[0.2, 0.1]]},
        {"thresholds": [[float("nan"), 0.1]]},
        {"thresholds": [0.1, 0.2]},
        {"rates": [[2.0, 0.0]]},
        {"rates": [[2.5, 1.0]]},
        {"rates": [[2.0]]},
        {"rule": 2},
        {"motion_on": True, "scale": 0.0},
    ],
)
def test_errors_are_those_of_the_compiled_module(compiled: ModuleType, changes: dict[str, Any]) -> None:
    messages = []
    for module in (compiled, plain):
        module.simulate(**GOOD)
        with pytest.raises(ValueError, match="expected") as raised:
            module.simulate(**(GOOD | changes))
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"sums": numpy.ones((1, 8))},
        {"state": numpy.ones((2, 11))},
        {"state": numpy.ones((1, 11), dtype=numpy.float32)},
        {"thresholds": []},
        {"rates": [1.0, 2.0]},
        {"step": 0},
        {"step": 9},
        {"step": [9]},
        {"step": [2, 2]},
        {"step": 1.5},
        {"num_steps": 0},
        {"thresholds": [[0.5], [0.5]]},
        {"thresholds": [[0.5]]},
        {"site": 1},
        {"strides": [4]},
        {"strides": [1] * 9},
        {"metric": 3},
    ],
)
def test_errors_of_decisions(compiled: ModuleType, changes: dict[str, Any]) -> None:
    good: dict[str, Any] = {"sums": numpy.ones((1, 9)), "thresholds": [0.5], "rates": [2.0], "step": 2}
    good |= {"num_steps": 8, "site": 0, "frames": 4, "strides": [1], "metric": 0, "rule": 0}
    good |= {"elements": 1.0, "first_step": 1, "last_step": 8, "scale": 0.0, "power": 1.0, "divisor": 1.0}
    good |= {"gradient_weight": 0.0}
    messages = []
    for module in (compiled, plain):
        good["state"] = module.initial_state(1, 1, 0)
        module.decide(**good)
        with pytest.raises(ValueError, match="expected") as raised:
            module.decide(**(good | changes))
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


def test_another_python_simulates_in_numpy(tmp_path: Path) -> None:
    """A package whose engine is for another Python: ops and simulation work, and the reason is stated."""
    if not adacache_kernels.build_info()["libraries"]["cpu"]["loaded"]:
        pytest.skip("the op libraries are not built")
    package = tmp_path / "adacache_kernels"
    package.mkdir()
    for path in FOLDER.iterdir():
        if not path.name.startswith(("_engine.", "__pycache__")):
            (package / path.name).symlink_to(path)
    # `Path.resolve` of a link would find the folder with the engine.
    for name in ("_libraries.py", "__init__.py"):
        (package / name).unlink()
        (package / name).write_bytes((FOLDER / name).read_bytes())
    (package / "_engine.cpython-39-x86_64-linux-gnu.so").touch()
    code = (
        # The finder of an editable install would find the module in the checkout.
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in f.__module__];"
        "import torch, adacache_kernels as ak; from adacache_kernels import simulate;"
        "print(simulate._engine().__name__, simulate.initial_state(1).shape);"
        "print(ak.backend_report()[0].backend);"
        "print(ak.build_info()['libraries']['engine']['reason'])"
    )
    environment = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[:2] == ["adacache_kernels._engine_numpy (1, 11)", "cpu"]
    assert f"no module for Python {sys.version_info[0]}.{sys.version_info[1]} is installed" in lines[2]
    assert "_engine.cpython-39-x86_64-linux-gnu.so" in lines[2]
    assert "simulate runs in NumPy" in lines[2]

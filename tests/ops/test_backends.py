# SPDX-License-Identifier: Apache-2.0
"""Backend selection, side effects of the import, and schemas."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import adacache_kernels
from adacache_kernels import BACKENDS, OPS, _backend, backend_report, build_info, simulate, use_backend
from adacache_kernels._backend import choose_backend
from adacache_kernels._libraries import covers
from adacache_kernels._schemas import SCHEMAS


def call() -> torch.Tensor:
    x = torch.ones(1, 2, 4)
    return adacache_kernels.reuse_residual(x, x)


def in_a_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("ADACACHE_BACKEND", "TRITON_INTERPRET")
    }
    root = Path(__file__).resolve().parents[2]
    return subprocess.run(
        [sys.executable, "-c", code], env=kept | environment, cwd=root, capture_output=True, text=True
    )


def test_built_libraries_are_loaded() -> None:
    """Otherwise a library that cannot be loaded would only cause skipped tests."""
    libraries = build_info()["libraries"]
    for name, library in libraries.items():
        if name != "cuda":
            assert library["loaded"], library["reason"]
    if torch.version.cuda and build_info()["cuda"]["built"]:
        assert libraries["cuda"]["loaded"], libraries["cuda"]["reason"]


def test_missing_op_falls_back_to_the_next_backend() -> None:
    code = """
import torch
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
def lacks_norms(op, key): return "norm" not in op and has_kernel(op, key)
torch._C._dispatch_has_kernel_for_dispatch_key = lacks_norms
import adacache_kernels
from adacache_kernels._backend import choose_backend
print(choose_backend("cpu", "gated_residual"), choose_backend("cpu", "layer_norm_modulate"))
x = torch.ones(1, 2, 4)
print(adacache_kernels.layer_norm_modulate(x, None, None).sum().item())
choices = {choice.op: choice for choice in adacache_kernels.backend_report() if choice.device == "cpu"}
print(choices["layer_norm_modulate"].backend, choices["layer_norm_modulate"].others["cpu"])
with adacache_kernels.use_backend("cpu"):
    adacache_kernels.gated_residual(x, x, None)
    try:
        adacache_kernels.layer_norm_modulate(x, None, None)
    except RuntimeError as error:
        print(error)
"""
    run = in_a_process(code)
    assert run.stdout.splitlines() == [
        "cpu reference",
        "0.0",
        "reference the compiled cpu library has no kernel for layer_norm_modulate",
        "layer_norm_modulate: 'cpu' cannot run here: the compiled cpu library has no kernel for "
        "layer_norm_modulate",
    ], run.stdout + run.stderr


def test_unknown_backend_is_an_error() -> None:
    with (
        pytest.raises(
            ValueError, match=r"^backend: expected one of cuda, cpu, triton, reference, got 'cudnn'"
        ),
        use_backend("cudnn"),
    ):
        pass


def test_backend_of_another_device_is_an_error() -> None:
    if _backend._missing("triton"):
        pytest.skip("the package triton is not installed")
    if _backend._INTERPRETED:
        pytest.skip("the Triton interpreter runs on CPU tensors")
    with (
        use_backend("triton"),
        pytest.raises(RuntimeError, match="'triton' is forced, but does not support tensors on 'cpu'"),
    ):
        call()
    call()


def test_missing_backend_is_an_error_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "_missing", lambda backend, op=None: "it is missing")
    with pytest.raises(RuntimeError, match="'cuda' cannot run here: it is missing"), use_backend("cuda"):
        pass


def fail_with_cpu_forced() -> None:
    assert _backend._forced.get() == "cpu"
    raise ZeroDivisionError


def test_use_backend_nests_and_ends_with_an_error() -> None:
    before = _backend._forced.get()
    with use_backend("reference"):
        with pytest.raises(ZeroDivisionError), use_backend("cpu"):
            fail_with_cpu_forced()
        assert _backend._forced.get() == "reference"
    assert _backend._forced.get() == before


def test_use_backend_is_thread_local() -> None:
    """Overlapping `with` blocks of two threads do not affect each other, and no backend stays forced."""
    inside, leave = threading.Barrier(2), threading.Event()
    seen: dict[str, str] = {}

    def force(backend: str, first_out: bool) -> None:
        with use_backend(backend):
            inside.wait(10)
            if not first_out:
                leave.wait(10)
            seen[backend] = choose_backend("cpu", "reuse_residual")
        leave.set()
        seen[f"{backend} after"] = choose_backend("cpu", "reuse_residual")

    before = choose_backend("cpu", "reuse_residual")
    threads = [threading.Thread(target=force, args=each) for each in (("reference", True), ("cpu", False))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert seen == {"reference": "reference", "cpu": "cpu", "reference after": before, "cpu after": before}
    assert choose_backend("cpu", "reuse_residual") == before


def test_a_thread_does_not_inherit_the_backend() -> None:
    before, seen = choose_backend("cpu", "reuse_residual"), []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(choose_backend("cpu", "reuse_residual")))
        thread.start()
        thread.join(20)
    assert seen == [before]


def test_compiled_code_follows_the_backend() -> None:
    """`use_backend` around a compiled function takes effect only inside the `with` block."""
    ran: list[bool] = []  # whether a graph calls the compiled op

    def spy(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        calls_op = any("adacache" in str(node.target) for node in graph.graph.nodes)

        def run(*arguments: Any) -> Any:
            ran.append(calls_op)
            return graph(*arguments)

        return run

    torch.compiler.reset()
    x = torch.randn(1, 6, 8)
    compiled = torch.compile(lambda x: adacache_kernels.reuse_residual(x, x), fullgraph=True, backend=spy)
    for backend in ("cpu", "reference", "cpu"):
        with use_backend(backend):
            assert torch.equal(compiled(x), x + x)
    compiled(x)
    assert ran == [True, False, True, choose_backend("cpu", "reuse_residual") == "cpu"]


def test_report_covers_every_op_device_and_backend() -> None:
    report = {(choice.op, choice.device): choice for choice in backend_report()}
    assert set(report) == {(op, device) for op in OPS for device in ("cpu", "cuda")}
    for (_, device), choice in report.items():
        assert {choice.backend, *choice.others} == set(BACKENDS)
        assert all(choice.others.values())
        with_device = {"cpu": "cuda", "cuda": "cpu"}[device]
        assert choice.others[with_device] == f"does not support {device} tensors"
    with use_backend("reference"):
        forced = backend_report()[0]
        assert forced.backend == "reference"
        assert forced.others["cpu"] == "reference is forced"


def test_other_devices_run_the_reference() -> None:
    x = torch.ones(1, 2, 4, device="meta")
    assert adacache_kernels.reuse_residual(x, x).shape == x.shape
    with use_backend("cpu"):
        assert adacache_kernels.reuse_residual(x, x).device.type == "meta"


def test_schemas_are_those_of_the_compiled_library() -> None:
    for name, schema in SCHEMAS.items():
        assert str(getattr(torch.ops.adacache, name).default._schema) == f"adacache::{name}{schema}"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("reference", "reference"),
        ("", "cpu"),
        ("gpu", "ValueError: ADACACHE_BACKEND: expected one of cuda, cpu, triton, reference, got 'gpu'"),
    ],
)
def test_variable_forces_a_backend(value: str, expected: str) -> None:
    code = (
        "from adacache_kernels._backend import choose_backend; print(choose_backend('cpu', 'reuse_residual'))"
    )
    run = in_a_process(code, ADACACHE_BACKEND=value)
    assert (run.stdout + run.stderr).strip().splitlines()[-1] == expected


def test_report_runs_with_an_invalid_variable() -> None:
    code = "import adacache_kernels as a; print(len(a.backend_report()))"
    run = in_a_process(code, ADACACHE_BACKEND="gpu")
    assert int(run.stdout) == 2 * len(OPS), run.stderr


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (["80", "86", "120+PTX"], (8, 0), True),
        (["80", "86", "120+PTX"], (8, 9), True),  # code of a lower minor version
        (["80", "86", "120+PTX"], (7, 5), False),
        (["80", "86", "120+PTX"], (9, 0), False),  # no code, and no PTX of a lower version
        (["80", "86", "120+PTX"], (13, 0), True),  # PTX
        (["90+PTX"], (8, 9), False),
        (["90a"], (9, 0), True),
        (["100a"], (10, 3), False),
        (["100f"], (10, 3), True),
        (["103"], (10, 0), False),
    ],
)
def test_which_gpus_the_cuda_library_covers(
    architectures: list[str], capability: tuple[int, int], runs: bool
) -> None:
    assert covers(architectures, capability) is runs


def test_gpu_without_cuda_binary_uses_triton() -> None:
    code = """
import torch
from adacache_kernels import _backend, _libraries, backend_report
_libraries._recorded = lambda: {"cuda": {"architectures": ["80", "90"]}}
_backend._missing = lambda backend, op=None: None
_backend._chosen["cuda", "reuse_residual"] = "cuda"
_backend._runnable.add(("triton", "cuda", "reuse_residual"))
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 2
torch.cuda.get_device_capability = lambda index: [(9, 0), (7, 5)][index]
print(_backend.choose_backend("cuda", "reuse_residual"))
choice = next(choice for choice in backend_report() if choice.device == "cuda")
print(choice.backend, choice.others["cuda"])
"""
    assert in_a_process(code).stdout.splitlines() == [
        "triton",
        "triton it is built for sm_80, sm_90, but cuda:1 is sm_75",
    ]


@pytest.mark.parametrize("package", ["adacache_kernels", "adacache"])
def test_import_opens_no_context_and_does_not_import_triton(package: str) -> None:
    code = (
        f"import json, sys, torch; before = 'triton' in sys.modules; import {package}; "
        "print(json.dumps([torch.cuda.is_initialized(), before, 'triton' in sys.modules]))"
    )
    run = in_a_process(code)
    assert run.returncode == 0, run.stderr
    initialised, before, after = json.loads(run.stdout)
    assert not initialised
    assert after == before


def test_ops_run_under_inductor() -> None:
    """With the default compiler backend, and the op between fusible operations."""
    x, y, old = (torch.randn(2, 12, 20) for _ in range(3))
    gate = torch.randn(2, 3, 20)

    def block(x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x_out, sums = adacache_kernels.gated_residual_meter(x * 2, y, gate, residual, frames=3)
        return x_out + 1, sums

    expected_residual, given_residual = old.clone(), old.clone()
    expected = block(x, expected_residual)
    given: Any = torch.compile(block, fullgraph=True)(x, given_residual)
    for one, other in zip(given, expected, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)
    assert torch.equal(given_residual, expected_residual)


def test_schedules_follow_the_decision() -> None:
    """`simulate` against `simulate.decide` with the same distances, step by step."""
    import numpy

    random = numpy.random.default_rng(0)
    steps, videos = 30, 3
    distances = random.uniform(0.05, 1.2, (videos, steps, steps))
    motion = random.uniform(0.3, 0.5, (videos, steps))
    codebooks = numpy.array([[0.08, 0.16, 0.24, 0.32, 0.4, 1.0], [0.02, 0.04, 0.08, 0.16, 0.3, 2.0]])
    rates = numpy.array([[6.0, 5, 4, 3, 2, 1], [9, 5, 4, 3, 2, 1]])
    for regularisation in (None, (4, 26)):
        computed, rate = simulate.simulate(distances, motion, codebooks, rates, window=regularisation)
        assert computed.shape == rate.shape == (2, videos, steps)
        for codebook in range(2):
            for video in range(videos):
                state = simulate.initial_state(1)
                for step in range(1, steps + 1):
                    last, due = int(state[0, 0]), state[0, 2] == step or step in (1, steps - 1, steps)
                    distance = distances[video, last - 1, step - 1] if last else 1.0
                    sums = [[distance, 1, 1, 0, 0, 0, 0, motion[video, step - 1], 1]]
                    simulate.decide(
                        sums,
                        state,
                        step=step,
                        num_steps=steps,
                        thresholds=codebooks[codebook],
                        rates=rates[codebook],
                        frames=2,
                        window=regularisation or (1, 0),
                        scale=0.385 if regularisation else 0.0,
                        power=8.0,
                        gradient_weight=10.0,
                    )
                    assert computed[codebook, video, step - 1] == due
                    assert rate[codebook, video, step - 1] == state[0, 1]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("distances", {"distances": [[0.0]]}),
        ("motion", {"motion": [[0.0] * 3]}),
        ("thresholds", {"thresholds": [[0.2, 0.1]]}),
        ("thresholds", {"thresholds": [0.1, 0.2]}),
        ("rates", {"rates": [[2.0, 0.0]]}),
        ("rates", {"rates": [[2.0]]}),
        ("rule", {"rule": "ours"}),
        ("scale", {"window": (1, 2), "scale": 0.0}),
    ],
)
def test_simulation_errors(name: str, changes: dict[str, Any]) -> None:
    good: dict[str, Any] = {
        "distances": [[[0.5] * 2] * 2],
        "motion": [[0.5] * 2],
        "thresholds": [[0.1, 0.2]],
        "rates": [[2.0, 1.0]],
    }
    simulate.simulate(**good)
    with pytest.raises(ValueError, match=f"^{name}: "):
        simulate.simulate(**(good | changes))

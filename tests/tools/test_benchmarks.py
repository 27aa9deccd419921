# SPDX-License-Identifier: Apache-2.0
"""The kernel benchmark: bytes, correctness checks, goals, and one run on a small shape."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tool_loading import ROOT, load

import adacache_kernels


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(monkeypatch, "benchmarks/kernels.py")


def case_of(kernels: ModuleType, name: str) -> Any:
    return next(case for case in kernels.CASES if case.name == name)


def record(kernels: ModuleType, case: str, backend: str = "cuda", **changes: Any) -> Any:
    fields = {
        "case": case,
        "op": case.split()[0],
        "shape": [2, 6, 4],
        "frames": 3,
        "dtype": "bfloat16",
        "backend": backend,
        "with_out": False,
        "microseconds": 10.0,
        "least": 9.0,
        "most": 12.0,
        "bytes": 1000,
        "gigabytes_per_second": 100.0,
        "share_of_copy_rate": 0.95,
        "times_eager": 5.0,
        "times_compiled": 2.0,
    }
    return kernels.Record(**(fields | changes))


def test_every_op_is_timed(kernels: ModuleType) -> None:
    assert {case.op for case in kernels.CASES} | {"decide"} == set(adacache_kernels.OPS)
    names = [case.name for case in kernels.CASES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gated_residual", 3 * 2 * 6 * 8 * 2 + 2 * 8 * 2),
        ("gated_residual_meter", 5 * 2 * 6 * 8 * 2 + 2 * 8 * 2),
        ("gated_residual_meter per frame", 5 * 2 * 6 * 8 * 2 + 2 * 3 * 8 * 2),
        ("gated_residual_meter float8", 3 * 2 * 6 * 8 * 2 + 2 * 2 * 6 * (8 + 4) + 2 * 8 * 2),
        ("reuse_residual float8", 2 * 2 * 6 * 8 * 2 + 2 * 6 * (8 + 4)),
        ("stack_residual_meter", 4 * 2 * 6 * 8 * 2),
        ("extrapolate_residual order 3", 6 * 2 * 6 * 8 * 2),
        ("extrapolate_residual_meter order 2", 5 * 2 * 6 * 8 * 2),
        ("layer_norm_modulate", 2 * 2 * 6 * 8 * 2 + 2 * 2 * 8 * 2),
        ("norm_modulate_float8", 2 * 6 * 8 * 2 + 2 * 6 * (8 + 4) + 2 * 2 * 8 * 2),
        ("gated_residual_norm_float8", 3 * 2 * 6 * 8 * 2 + 2 * 6 * (8 + 4) + 3 * 2 * 8 * 2),
        ("gated_residual_norm_meter", 6 * 2 * 6 * 8 * 2 + 3 * 2 * 8 * 2),
    ],
)
def test_minimum_bytes(kernels: ModuleType, name: str, expected: int) -> None:
    assert case_of(kernels, name).bytes(kernels.Shape(2, 3, 2, 8), 2) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_op_is_not_timed(
    kernels: ModuleType, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong element, a wrong sum and unwritten memory are detected."""
    shape, device = kernels.Shape(2, 3, 4, 16), torch.device("cpu")
    for name in ("gated_residual_meter", "layer_norm_modulate", "gated_residual_meter float8"):
        case = case_of(kernels, name)
        values = kernels.make_inputs(case, shape, dtype, device)
        expected = kernels.expect(case, values)
        assert kernels.find_fault(case, expected, values, "reference") == ""
        for index in range(len(case.checks)):

            def spoilt(*arguments: Any, case: Any = case, index: int = index) -> Any:
                results = [result.clone() for result in case.call(*arguments)]
                wrong = results[index].view(-1)
                if wrong.dtype == torch.float8_e4m3fn:
                    wrong.view(torch.uint8)[-1] ^= 1
                else:
                    wrong[-1] = wrong[-1] * 1.25 + 3
                return tuple(results)

            fault = kernels.find_fault(replace(case, call=spoilt), expected, values, "reference")
            assert fault.startswith(f"output {index}: "), name

    case = case_of(kernels, "norm_modulate_float8")
    values = kernels.make_inputs(case, shape, dtype, device)
    expected = kernels.expect(case, values)
    assert kernels.find_fault(case, expected, values, "reference") == ""
    for flips, factor in ((0x80, 1), (0, 1.25)):

        def quantized_wrong(
            *arguments: Any, case: Any = case, flips: int = flips, factor: float = factor
        ) -> Any:
            stored, scale = case.call(*arguments)
            return (stored.view(torch.uint8) ^ flips).view(stored.dtype), scale * factor

        fault = kernels.find_fault(replace(case, call=quantized_wrong), expected, values, "reference")
        assert fault.startswith("output 0: ")

    case = case_of(kernels, "gated_residual")

    def unwritten(ak: Any, v: Any, out: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return (out["out"],) if out else case.call(ak, v, out)

    values = kernels.make_inputs(case, shape, dtype, device)
    expected = kernels.expect(case, values)
    assert "differ from eager" in kernels.find_fault(
        replace(case, call=unwritten), expected, values, "reference"
    )


def test_goals_of_a_gpu_are_marked(kernels: ModuleType) -> None:
    records = [
        record(kernels, "gated_residual", gigabytes_per_second=102.0),
        record(kernels, "gated_residual_meter", times_compiled=1.4),
        record(kernels, "reuse_residual", share_of_copy_rate=0.9),
        record(kernels, "decide", bytes=0, microseconds=4.0, times_eager=None),
        record(kernels, "temporal_attention", times_eager=None),
        record(kernels, "gated_residual", "triton", gigabytes_per_second=120.0),
        record(kernels, "gated_residual_meter", "triton"),
    ]
    goals = {(g.case, g.backend, g.what): g.reached for g in kernels.find_goals(records, "cuda")}
    cost = "time per byte, relative to gated_residual"
    assert goals == {
        ("gated_residual_meter", "cuda", "share_of_copy_rate"): True,
        ("gated_residual_meter", "cuda", "times_eager"): True,
        ("gated_residual_meter", "cuda", "times_compiled"): False,
        ("gated_residual_meter", "cuda", cost): True,
        ("reuse_residual", "cuda", "share_of_copy_rate"): False,
        ("decide", "cuda", "microseconds"): True,
        ("gated_residual_meter", "triton", "share_of_copy_rate"): True,
        ("gated_residual_meter", "triton", "times_eager"): True,
        ("gated_residual_meter", "triton", "times_compiled"): True,
        ("gated_residual_meter", "triton", cost): False,
    }


@pytest.mark.parametrize(
    ("times_eager", "share", "reached"), [(3.5, 0.2, True), (2.0, 0.9, True), (2.0, 0.8, False)]
)
def test_cpu_goal_has_two_alternatives(
    kernels: ModuleType, times_eager: float, share: float, reached: bool
) -> None:
    records = [
        record(kernels, "reuse_residual", "cpu", times_eager=times_eager, share_of_copy_rate=0.1),
        record(kernels, "reuse_residual", "cpu", times_eager=9.0, share_of_copy_rate=share, with_out=True),
    ]
    goals = kernels.find_goals(records, "cpu")
    assert [goal.reached for goal in goals] == [reached]


def test_shapes_are_parsed(kernels: ModuleType) -> None:
    assert kernels.read_shape("720p-2s").size == (2, 54000, 1152)
    assert kernels.read_shape("480p-2s").size == (2, 23850, 1152)
    assert kernels.read_shape("1x3x4x64") == kernels.Shape(1, 3, 4, 64)
    with pytest.raises(SystemExit, match="--shape: expected 480p-2s"):
        kernels.read_shape("1x2x3")


def test_rotated_inputs_exceed_the_cache(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = sys.modules["measure"]
    monkeypatch.setattr(measure, "_cache_bytes", lambda device: 100)
    cpu = torch.device("cpu")
    assert [measure.input_sets(size, cpu) for size in (1000, 100, 30, 1)] == [2, 2, 5, 64]


def test_rounds_are_interleaved_and_reduced_to_medians(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = sys.modules["measure"]
    order: list[tuple[str, int]] = []
    times = iter([9.0, 9.0, 1.0, 10.0, 5.0, 30.0, 2.0, 20.0])

    def timed(candidate: Any, turn: int, device: torch.device) -> float:
        candidate(turn)
        return next(times)

    monkeypatch.setattr(measure, "_time", timed)
    candidates = {name: (lambda turn, name=name: order.append((name, turn))) for name in ("a", "b")}
    timings = measure.measure(candidates, torch.device("cpu"), repeat=3, warmup=1)
    assert order == [(name, turn) for turn in range(4) for name in ("a", "b")]
    assert [timings[name].median for name in ("a", "b")] == [2.0, 20.0]
    assert timings["a"].least == 1.0


def test_run_writes_table_json_and_plot(tmp_path: Path) -> None:
    figures, picture = tmp_path / "k.json", tmp_path / "k.png"
    command = [
        sys.executable,
        "benchmarks/kernels.py",
        "--shape",
        "1x3x4x16",
        "--repeat",
        "2",
        "--no-compile",
    ]
    command += ["--ops", "reuse_residual", "decide", "--json", str(figures), "--plot", str(picture)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "copy into new memory" in done.stdout
    found = json.loads(figures.read_text())
    lines = {(r["case"], r["backend"], r["with_out"]) for r in found["records"]}
    assert {
        ("reuse_residual", "cpu", False),
        ("reuse_residual", "cpu", True),
        ("decide", "cpu", False),
    } <= lines
    assert {goal["case"] for goal in found["goals"]} == {"reuse_residual", "reuse_residual float8"}
    for line in found["records"]:
        if line["bytes"]:
            rate = line["bytes"] / line["microseconds"] / 1e3
            assert rate == pytest.approx(line["gigabytes_per_second"])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_input_copies_have_the_requested_dtype(kernels: ModuleType) -> None:
    values = SimpleNamespace(frames=3, x=torch.ones(2), stored=torch.ones(2).to(torch.float8_e4m3fn))
    copied = kernels.copy_inputs(values, torch.float64)
    assert (copied.frames, copied.x.dtype, copied.stored.dtype) == (3, torch.float64, torch.float8_e4m3fn)
    copied = kernels.copy_inputs(values)
    copied.x.zero_()
    assert values.x.sum() == 2


def test_predictions_replace_previous_ones(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    prediction = load(monkeypatch, "benchmarks/prediction.py")
    readme, report = tmp_path / "README.md", tmp_path / "report.json"
    readme.write_text(f"before\n{prediction.BEGIN}\nold\n{prediction.END}\nafter\n")
    usage = {"arch": "sm_90", "registers": 61, "blocks": 4, "occupancy": 0.5}
    report.write_text(json.dumps([{"kernel": case.kernel, **usage} for case in kernels.CASES if case.kernel]))
    monkeypatch.setattr(prediction, "README", readme)
    monkeypatch.setattr(prediction, "REPORT", report)
    for _ in range(2):
        prediction.write_predictions()
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    line = next(line for line in text.splitlines() if line.startswith("| `gated_residual_meter` |"))
    # 5 passes over [2, 23850, 1152] and [2, 54000, 1152] in bfloat16 at 90 % of 3.35 TB/s.
    assert "| 61 | 4 | 50% | 550, 182 | 1244, 413 |" in line
    assert "90% of copy" in line
    report.write_text("[]")
    with pytest.raises(SystemExit, match=r"report\.json: missing extrapolate_residual"):
        prediction.write_predictions()

# SPDX-License-Identifier: Apache-2.0
"""The benchmark of methods: figures, tuning, resumption, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import adacache
import pytest
import torch
from adacache.calibration import psnr
from adacache.digits.captions import Prompt
from adacache.digits.subject import subject_of_model
from adacache.models.rectified_flow import RectifiedFlow
from tool_loading import load
from torch import Tensor

STEPS = 8


@pytest.fixture
def methods(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(monkeypatch, "benchmarks/methods.py")


@pytest.fixture
def model(methods: ModuleType, tiny_digit_model: Any) -> Any:
    subject = subject_of_model(tiny_digit_model, RectifiedFlow(num_steps=STEPS, guidance_scale=2.0))
    prompts = [Prompt(3, "resting", "up", "plain"), Prompt(4, "racing", "left", "noisy")]
    tests = [(prompt, prompt.motion, 7 + number) for number, prompt in enumerate(prompts)]
    tuning = [(prompt, 70 + number) for number, prompt in enumerate(prompts)]
    return methods.Model(subject, tests, tuning, lambda clips, wanted: {"clips": len(clips)})


def full_clips(model: Any) -> list[Tensor]:
    return [model.subject.generate(prompt, seed) for prompt, _, seed in model.tests]


def test_a_row_with_fewer_steps(methods: ModuleType, model: Any) -> None:
    full = full_clips(model)
    flops = methods.flops(lambda: model.subject.generate(*model.tests[0][::2]))
    row = methods.measure(model, methods.Row("fewer steps", "4", steps=4), full, flops)
    errors = [
        float((model.subject.generate_with(prompt, seed, 4) - clip).double().square().mean())
        for (prompt, _, seed), clip in zip(model.tests, full, strict=True)
    ]
    psnrs = [10 * torch.log10(4 / torch.tensor(error, dtype=torch.float64)) for error in errors]
    assert row["PSNR"] == pytest.approx(float(sum(psnrs) / 2), rel=1e-4)
    assert row["PSNR worst clip"] == pytest.approx(float(min(psnrs)), rel=1e-4)
    assert set(row["PSNR by class"]) == {"resting", "racing"}
    assert (row["steps"], row["computed share"], row["clips"]) == (4.0, 0.5, 2)
    assert row["FLOPs share"] == pytest.approx(0.5, rel=1e-6)


def test_a_cached_row_counts_what_was_computed(methods: ModuleType, model: Any) -> None:
    full = full_clips(model)
    flops = methods.flops(lambda: model.subject.generate(*model.tests[0][::2]))
    path = adacache.PlannedPath([1, 2, 5, 8], [0, 0.5, 0.5, 0])
    row = methods.measure(model, methods.Row("planned path", "4", lambda: path), full, flops)
    assert row["steps"] == 4.0
    assert row["FLOPs share"] == pytest.approx(0.5, rel=1e-6)
    all_computed = adacache.PlannedPath(list(range(1, STEPS + 1)), [0.0] * STEPS)
    row = methods.measure(model, methods.Row("all", "", lambda: all_computed), full, flops)
    assert (row["PSNR"], row["SSIM"]) == (120.0, pytest.approx(1.0, abs=1e-6))


def test_a_threshold_is_tuned_to_a_number_of_steps(methods: ModuleType, model: Any) -> None:
    def make(threshold: float) -> Any:
        return adacache.Interval(interval=min(STEPS, max(1, round(10 * threshold))))

    threshold = methods.tuned(model, make, 4)
    steps = [methods.run_clip(model, make(threshold), p, seed)[1] for p, seed in model.tuning]
    assert abs(sum(steps) / len(steps) - 4) <= 1


def test_rows_are_kept_and_not_run_again(
    methods: ModuleType, model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setitem(methods.MODELS, "digits", lambda clips, steps: model)
    measured: list[str] = []
    plain = methods.measure

    def measure(model: Any, row: Any, *rest: Any) -> Any:
        measured.append(row.name)
        return plain(model, row, *rest)

    monkeypatch.setattr(methods, "measure", measure)
    out = tmp_path / "rows.json"
    given = ["digits", "--steps", str(STEPS), "--only", "fewer", "even", "--out", str(out)]
    plot = ["--plot", str(tmp_path / "plot.png")]
    threads = torch.get_num_threads()
    try:
        assert methods.main([*given, *plot]) == 0
        first = list(measured)
        assert {name.split(" |")[0] for name in first} == {"fewer steps", "even reuse"}
        assert list(json.loads(out.read_text())["rows"]) == first
        assert "PSNR dB" in capsys.readouterr().out
        assert methods.main([*given, "--reference", str(2 * STEPS)]) == 0
        assert measured == first
        finer = [model.subject.generate_with(prompt, seed, 2 * STEPS) for prompt, _, seed in model.tests]
        expected = sum(psnr(a, b, 2.0) for a, b in zip(full_clips(model), finer, strict=True)) / 2
        assert json.loads(out.read_text())["reference"] == {
            "steps": 2 * STEPS,
            "PSNR": pytest.approx(expected),
        }
        assert f"against {2 * STEPS} steps: {expected:.1f} dB" in capsys.readouterr().out
        with pytest.raises(SystemExit, match="contains another run"):
            methods.main(["digits", "--steps", "9", "--out", str(out)])
    finally:
        torch.set_num_threads(threads)
    assert (tmp_path / "plot.png").exists()


def test_adaptive_rows_are_those_of_the_file(methods: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "paths.json"
    file.write_text(json.dumps({"budgets": {"4": {}, "6": {}}}))
    assert methods.adaptive_budgets(file) == []
    file.write_text(json.dumps({"budgets": {}, "adaptive": {"prices": {"4": 0.1, "6": 0.2}}}))
    assert methods.adaptive_budgets(file) == [6, 4]

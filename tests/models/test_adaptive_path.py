# SPDX-License-Identifier: Apache-2.0
"""Adaptive paths: each video gets the path that its measurement selects, in a pipeline and from a file; and
their calibration."""

from __future__ import annotations

import functools
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import adacache
import numpy as np
import pytest
import torch
from adacache.calibration import calibrate_adaptive, calibrate_paths, psnr
from adacache.calibration.adaptive import error_lines, path_counts, price_of, with_start
from adacache.calibration.paths import shortest_with_memory
from adacache.calibration.trajectory import trajectory
from adacache.commands.cli import main
from adacache.policies import AdaptivePath, PlannedPath
from model_cases import WAN, relative_error
from test_calibrate_paths import small_subject
from test_planned_path import CASE, built

pytest.importorskip("diffusers", reason="diffusers is not installed")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

STEPS = 12
SHORT = PlannedPath([1, 2, 4, 12], [0.0, 0.6, 1.1, 0.0])
LONG = PlannedPath([1, 2, 4, 6, 8, 10, 12], [0.0, 0.6, 0.9, 1.0, 0.8, 1.2, 0.0])
PATHS = [SHORT, LONG]
NAMES = ["WanPipeline", "LattePipeline", "CogVideoXPipeline"]


def adaptive(threshold: float) -> AdaptivePath:
    """The long path for a mean square above the threshold."""
    # error of the short path - error of the long one = price * difference of steps, at the threshold
    return AdaptivePath(PATHS, 3, [(0.0, 1.0), (-50.0, 0.0)], threshold / 3)


def test_the_cheapest_path_is_chosen() -> None:
    policy = AdaptivePath(PATHS, 3, [(1.0, 2.0), (-1.0, 1.5)], 0.3)
    for value in (0.01, 0.1, 0.5, 1.0, 3.0):
        costs = {
            len(path.computed): math.exp(a) * value**b + 0.3 * len(path.computed)
            for path, (a, b) in zip(PATHS, policy.lines, strict=True)
        }
        assert len(policy.choose(value).computed) == min(costs, key=lambda steps: costs[steps])
    assert policy.choose(math.nan) is LONG
    assert policy.choose(0.0) is LONG
    assert policy.choose(0.01) is SHORT
    assert policy.choose(3.0) is LONG


def mean_square(name: str) -> float:
    """Of the guided output at step 4, if step 3 is skipped."""
    subject = small_subject(name, num_steps=STEPS)

    def given(step: int, before: Any) -> Any:
        return before[1] + SHORT.factors[1] * (before[1] - before[0]) if step == 2 else None

    forms = trajectory(subject, "a", 0).forms
    return float((trajectory(subject, "a", 0, given=given, forms=forms).outputs[3].double() ** 2).mean())


@pytest.mark.parametrize("name", NAMES)
def test_the_measurement_selects_the_path(name: str) -> None:
    case = CASE[name]
    value = mean_square(name)
    for threshold, path in ((value * 1.01, SHORT), (value * 0.99, LONG)):
        fixed, pipeline = built(name), built(name)
        adacache.enable(fixed, path)
        expected = case.generate(fixed, STEPS)
        handle = adacache.enable(pipeline, adaptive(threshold))
        found = case.generate(pipeline, STEPS)
        assert torch.equal(found, expected)
        assert handle.trace.computed_steps == list(path.computed)
        (record,) = handle.trace.measurements
        assert record["step"] == 4
        assert record["distance"][0] == pytest.approx(value, rel=1e-5)
        assert torch.equal(case.generate(pipeline, STEPS), found)


@pytest.mark.parametrize("name", NAMES)
def test_each_video_of_a_batch_has_its_own_path(name: str) -> None:
    case = CASE[name]

    def generate(policy: Any) -> tuple[Any, Any]:
        pipeline = built(name)
        handle = adacache.enable(pipeline, policy)
        return case.generate(pipeline, STEPS, prompts=2), handle.trace

    _, trace = generate(adaptive(1e9))
    values = trace.measurements[0]["distance"]
    assert len(values) == 2
    chosen = [LONG if value == max(values) else SHORT for value in values]
    assert set(map(id, chosen)) == {id(SHORT), id(LONG)}
    found, trace = generate(adaptive(sum(values) / 2))
    for video, path in enumerate(chosen):
        assert trace.computed_steps == list(LONG.computed), "the model runs for the whole batch"
        fixed, _ = generate(path)
        assert relative_error(found[video], fixed[video]) < 1e-5
        other, _ = generate(SHORT if path is LONG else LONG)
        assert relative_error(found[video], other[video]) > 1e-4


def test_a_value_that_is_not_finite_gets_the_longest_path() -> None:
    pipeline = built("WanPipeline")
    handle = adacache.enable(pipeline, adaptive(1e9))
    with torch.no_grad():
        pipeline.transformer.proj_out.bias.fill_(math.nan)
    CASE["WanPipeline"].generate(pipeline, STEPS)
    assert handle.trace.computed_steps == list(LONG.computed)
    assert handle.trace.measurements[0]["nonfinite"] == [True]


def test_a_model_by_itself_is_refused() -> None:
    model = WAN.model()
    handle = adacache.enable(model, adaptive(1.0), num_steps=STEPS)
    values = WAN.values(1)
    with pytest.raises(ValueError, match="enable it on the pipeline"):
        WAN.predict(model, values, values[WAN.latents], 0, STEPS)
    assert handle.enabled


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"paths": []}, 'paths: expected at least one PlannedPath of level "guided"'),
        ({"paths": [SHORT, PlannedPath([1, 2], [0, 1], "branch")]}, 'paths: .* level "guided"'),
        ({"shared": 1}, "shared: expected"),
        ({"shared": 5}, "shared: expected"),
        ({"shared": 4}, "paths: expected the same first 4 computed steps"),
        (
            {"paths": [SHORT, PlannedPath([1, 2, 4, 8], [0.0, 0.7, 1.0, 1.0])]},
            "paths: expected .* the same factors",
        ),
        ({"lines": [(0.0, 1.0)]}, "lines: expected 2, one per path, got 1"),
        ({"lines": [(0.0, 1.0), (0.0,)]}, r"lines\[1\]"),
        ({"price": -1.0}, "price: expected"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
    arguments = {"paths": PATHS, "shared": 3, "lines": [(0.0, 1.0), (0.0, 1.0)], "price": 0.1, **changes}
    with pytest.raises(ValueError, match=message):
        AdaptivePath(**arguments)


# Calibration.


def test_lines_are_least_squares() -> None:
    source = np.random.default_rng(0)
    signal = source.normal(size=200)
    errors = np.stack([2 - 3 * signal, 0.5 * signal - 1], 1)
    for (intercept, slope), (a, b) in zip(error_lines(signal, errors), [(2, -3), (-1, 0.5)], strict=True):
        assert slope == pytest.approx(b * 200 / 201)  # pulled to 0 by one clip
        assert intercept + slope * signal.mean() == pytest.approx(a + b * signal.mean())
    assert error_lines(np.ones(3), errors[:3])[0] == (pytest.approx(errors[:3, 0].mean()), 0)


def test_price_gives_the_mean() -> None:
    numbers = [4, 5, 7, 9]
    source = np.random.default_rng(1)
    errors = np.exp(source.normal(size=(30, 1)) - np.array(numbers))
    for mean in (4.5, 5.0, 6.0, 8.0):
        price = price_of(errors, numbers, mean)
        counts = np.array(numbers)[(errors + price * np.array(numbers)).argmin(1)]
        assert counts.mean() <= mean
        more = np.array(numbers)[(errors + price * (1 - 1e-9) * np.array(numbers)).argmin(1)]
        assert more.mean() > mean, "the price is the smallest"


def test_paths_start_with_the_shared_steps() -> None:
    source = np.random.default_rng(0)
    cost = np.exp(source.normal(size=(9,) * 3))
    for budget in (3, 4, 6):
        path, _ = shortest_with_memory(with_start(cost, [0, 2, 3]), budget)
        assert path[:3] == [0, 2, 3]
        assert len(path) == budget
    free, _ = shortest_with_memory(cost, 4)
    assert shortest_with_memory(with_start(cost, free[:3]), 4)[0] == free


def test_numbers_of_the_paths() -> None:
    assert path_counts(8, 25, 50) == [7, 8, 9, 10, 12, 13, 15, 17, 19, 22, 25]
    assert path_counts(3, 4, 10) == [3, 4]
    assert path_counts(2, 2, 10) == [2, 3]
    assert path_counts(5, 80, 10)[-1] == 10


def calibrated(folder: Path) -> tuple[Any, Path]:
    """A subject, and its file of planned paths."""
    file = folder / "paths.json"
    file.write_text(planned_file())
    return small_subject(), file


@functools.cache
def planned_file() -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "paths.json")
        found = calibrate_paths(small_subject(), ["a", "b"], [], budgets=[8, 6, 4], probed=1, refine=1)
        found.write(file)
        return file.read_text()


def test_calibration_and_enable(tmp_path: Path) -> None:
    subject, file = calibrated(tmp_path)
    before = json.loads(file.read_text())
    lines: list[str] = []
    found = calibrate_adaptive(file, subject, ["a", "b", "c", "d"], ["e"], say=lines.append)
    after = json.loads(file.read_text())
    assert {name: after[name] for name in before} == before, "the planned paths are kept"
    start = [step - 1 for step in before["budgets"]["6"]["computed"][:2]]
    assert all(path[:2] == start for path in found.paths)
    assert all(path[-1] == subject.num_steps - 1 for path in found.paths)
    assert [len(path) for path in found.paths] == path_counts(4, 8, subject.num_steps)
    assert list(found.prices) == [6]
    ((steps, reached),) = found.held_out[6]["adaptive"]
    assert found.held_out[6]["planned"][0][0] == 6
    pipeline = subject.model
    full = subject.generate("e", 4)
    handle = adacache.enable(pipeline, file, budget=6, adaptive=True)
    output = subject.generate("e", 4)
    assert len(handle.trace.computed_steps) == steps
    assert psnr(output, full, float(full.max() - full.min())) == pytest.approx(reached, abs=0.1)
    adacache.disable(pipeline)
    by_speedup = adacache.enable(pipeline, file, num_steps=subject.num_steps, speedup=10 / 6, adaptive=True)
    assert torch.equal(subject.generate("e", 4), output)
    assert by_speedup.trace.computed_steps == handle.trace.computed_steps
    adacache.disable(pipeline)


def test_errors_of_the_calibration_are_those_of_runs(tmp_path: Path) -> None:
    """The lines go through the errors of one clip; the signal is that of its full run."""
    subject, file = calibrated(tmp_path)
    found = calibrate_adaptive(file, subject, ["c"], [], seed=5)
    full = trajectory(subject, "c", 5)
    for path, factors, (intercept, slope) in zip(found.paths, found.factors, found.lines, strict=True):
        assert slope == 0
        adacache.enable(subject.model, PlannedPath([step + 1 for step in path], factors))
        error = (subject.generate("c", 5).double() - full.states[-1].double()).square().mean()
        adacache.disable(subject.model)
        assert math.exp(intercept) == pytest.approx(float(error), rel=1e-2, abs=1e-11)


def test_a_choice_that_is_not_in_the_file(tmp_path: Path) -> None:
    subject, file = calibrated(tmp_path)
    pipeline = subject.model
    with pytest.raises(ValueError, match=r"adaptive: expected False, because .* has not extended"):
        adacache.enable(pipeline, file, budget=6, adaptive=True)
    calibrate_adaptive(file, subject, ["a"], [])
    with pytest.raises(ValueError, match=r"budget: .* calibrated for mean budgets \[6\], got 4"):
        adacache.enable(pipeline, file, budget=4, adaptive=True)
    with pytest.raises(ValueError, match=r"num_steps: .* calibrated for 10 steps, got 9"):
        adacache.enable(pipeline, file, num_steps=9, budget=6, adaptive=True)
    with pytest.raises(ValueError, match="adaptive: expected none of them with settings"):
        adacache.enable(pipeline, SHORT, adaptive=True)
    with pytest.raises(ValueError, match="adaptive: expected False, because open-sora/fast"):
        adacache.enable(pipeline, "open-sora/fast", num_steps=30, adaptive=True)
    values = json.loads(file.read_text())
    for change, message in (
        ({"shared": 1}, r"adaptive\.shared: expected"),
        ({"prices": {"6": -1}}, r"adaptive\.prices\.6: expected"),
        ({"prices": []}, r"adaptive\.prices: expected"),
        ({"paths": []}, r"adaptive\.paths: expected"),
    ):
        file.write_text(json.dumps({**values, "adaptive": {**values["adaptive"], **change}}))
        with pytest.raises(ValueError, match=message):
            adacache.enable(pipeline, file, budget=6, adaptive=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"level": "branch"}, "level: expected 'guided', got 'branch'"),
        ({"model": "Other"}, "model: expected 'WanTransformer3DModel', got 'Other'"),
        ({"scheduler": "Other"}, "scheduler: expected 'FlowMatchEulerDiscreteScheduler', got 'Other'"),
        ({"sensitivity": [1.0]}, "sensitivity"),
        ({"sensitivity": None}, "sensitivity"),
    ],
)
def test_a_file_that_does_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    subject, file = calibrated(tmp_path)
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(ValueError, match=message):
        calibrate_adaptive(file, subject, ["a"], [])


def test_bad_calls_of_the_calibration(tmp_path: Path) -> None:
    subject, file = calibrated(tmp_path)
    with pytest.raises(ValueError, match="prompts: expected at least one"):
        calibrate_adaptive(file, subject, [], [])
    with pytest.raises(ValueError, match=r"num_steps: .* calibrated for 10 steps, got 9"):
        calibrate_adaptive(file, small_subject(num_steps=9), ["a"], [])


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, file = calibrated(tmp_path)
    given = ["calibrate", "test_calibrate_paths:cli_subject", "--count", "2", "--held-out", "1"]
    out = tmp_path / "adaptive.json"
    assert main([*given, "--num-steps", "10", "--adaptive", str(file), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "adaptive steps" in printed
    assert "budget=6, adaptive=True" in printed
    assert "adaptive" in json.loads(out.read_text())
    assert "adaptive" not in json.loads(file.read_text())
    assert main([*given, "--num-steps", "10", "--adaptive", str(file), "--refine", "2"]) != 0
    assert "--refine: expected without --adaptive only" in capsys.readouterr().err

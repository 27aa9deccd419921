# SPDX-License-Identifier: Apache-2.0
"""`adacache calibrate` for planned paths: recorded runs, runs without a model, and the calibration file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import adacache
import numpy as np
import pytest
import torch
from adacache.calibration import Subject, calibrate_paths, psnr
from adacache.calibration.clips import Clip, cached_run
from adacache.calibration.planning import _matched, measured_sensitivity, solver_coefficients
from adacache.calibration.trajectory import trajectory
from adacache.commands.cli import main
from adacache.policies import PlannedPath, PlannedTimesteps
from model_cases import relative_error
from pipeline_cases import PIPELINES, unipc
from torch import Tensor

pytest.importorskip("diffusers", reason="diffusers is not installed")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

STEPS = 10
CASE = {str(case): case for case in PIPELINES}


def small_subject(name: str = "WanPipeline", scheduler: Any = None, num_steps: int = STEPS) -> Subject:
    torch.manual_seed(0)
    case = CASE[name]
    pipeline = case.build()
    if scheduler is not None:
        pipeline.scheduler = scheduler

    def generate(prompt: Any, seed: int, steps: int = num_steps) -> Tensor:
        return case.generate(pipeline, steps, seed=seed)

    return Subject(pipeline, generate, num_steps, name, generate_with=generate)


def cli_subject(num_steps: int | None) -> tuple[Subject, list[str]]:
    return small_subject(num_steps=num_steps or STEPS), ["a", "b", "c", "d", "e"]


def schedulers() -> dict[str, Any]:
    import diffusers

    return {
        "euler": None,
        "unipc": unipc(),
        "dpm": diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    }


@pytest.mark.parametrize(
    "kind", ["euler", "unipc", "dpm", "LattePipeline", "CogVideoXPipeline", "AllegroPipeline"]
)
def test_a_solver_repeats_a_run_without_the_model(kind: str) -> None:
    made = schedulers()
    subject = small_subject(scheduler=made[kind]) if kind in made else small_subject(kind)
    plain = subject.generate("a", 3)
    full = trajectory(subject, "a", 3)
    assert torch.equal(full.result, plain), "recording changes nothing"
    assert len(full.outputs) == STEPS
    assert relative_error(full.solver.run(full.states[0], full.outputs)[-1], full.states[-1]) < 1e-5
    calls: list[int] = []
    handle = subject.model.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    again = trajectory(subject, "a", 3, given=lambda step, before: full.outputs[step] if step else None)
    handle.remove()
    assert relative_error(again.states[-1], full.states[-1]) < 1e-5
    assert len(calls) == len(full.forms[0]), "the model ran at the first step only"


def test_coefficients_of_euler_equal_its_steps() -> None:
    subject = small_subject()
    full = trajectory(subject, "a", 0)
    found = solver_coefficients(full.solver, full.states[0], STEPS)
    sigmas = full.solver.scheduler.sigmas.numpy()
    np.testing.assert_allclose(found, np.diff(sigmas), rtol=1e-3, atol=1e-5)


def test_sensitivity_of_a_model_that_ignores_its_input() -> None:
    """The sensitivity then equals the coefficients of the scheduler."""
    subject = small_subject()
    constant = torch.randn(1, 4, 3, 4, 4)
    subject.model.transformer.forward = lambda hidden_states, timestep, encoder_hidden_states, **_: (
        constant * float(timestep.mean()) ** 2,
    )
    full = trajectory(subject, "a", 0)
    coefficients = solver_coefficients(full.solver, full.states[0], STEPS)
    found = measured_sensitivity(subject, [Clip("a", 0, full)], coefficients)
    np.testing.assert_allclose(found, coefficients, rtol=1e-3)


@pytest.mark.parametrize("kind", ["euler", "unipc"])
def test_cached_runs_match_enabled_runs(kind: str) -> None:
    """Predicted results of a path equal the results with the path enabled."""
    subject = small_subject(scheduler=schedulers()[kind])
    clips = [Clip("a", seed, trajectory(subject, "a", seed)) for seed in (0, 1)]
    path = [0, 1, 3, 6]
    factors, finals = _matched(subject, clips, path, None)
    assert factors[0] == 0
    assert all(factor != 0 for factor in factors[1:])
    policy = PlannedPath([step + 1 for step in path], factors)
    for clip, final in zip(clips, finals, strict=True):
        assert relative_error(cached_run(subject, clip, path, factors).states[-1], final) < 1e-4
        adacache.enable(subject.model, policy)
        assert relative_error(subject.generate("a", clip.seed), final) < 1e-4
        adacache.disable(subject.model)


def test_matched_factors_minimize_the_window_error() -> None:
    """Any other factor of a window increases the error at its end."""
    subject = small_subject()
    clip = Clip("a", 0, trajectory(subject, "a", 0))
    path = [0, 1, 5]
    factors, _ = _matched(subject, [clip], path, None)

    def end(factor: float) -> float:
        def given(step: int, before: Any) -> Tensor | None:
            if step in path:
                return None
            return before[1] + factor * (step - 1) * (before[1] - before[0])

        run = clip.run(subject, given, stop=5)
        return float((run.states[5] - clip.full.states[5]).norm())

    assert end(factors[1]) < min(end(factors[1] - 0.05), end(factors[1] + 0.05))


def test_timesteps_alone_in_a_calibration_run() -> None:
    subject = small_subject(scheduler=unipc())
    grid = PlannedTimesteps([1, 2, 5, 9], STEPS)
    found = trajectory(subject, "a", 0, grid=grid)
    assert len(found.outputs) == 4
    adacache.enable(subject.model, grid)
    assert torch.equal(subject.generate("a", 0), found.result)


def test_calibration_and_its_file(tmp_path: Path) -> None:
    subject = small_subject()
    lines: list[str] = []
    found = calibrate_paths(subject, ["a", "b", "c"], ["d", "e"], budgets=[6, 4], refine=4, say=lines.append)
    path = tmp_path / "paths.json"
    found.write(path)
    values = json.loads(path.read_text())
    assert (values["model"], values["num_steps"]) == ("WanTransformer3DModel", STEPS)
    assert list(values["budgets"]) == ["6", "4"]
    for number, budget in found.budgets.items():
        assert len(budget.path) == number
        assert budget.calibration[budget.fit] == max(
            score for name, score in budget.calibration.items() if name != "timesteps alone"
        )
        planned, fewer = budget.held_out["planned"], budget.held_out["fewer steps"]
        assert np.mean(planned) > np.mean(fewer) + 3
    assert any("full run 3 of 3" in line for line in lines)
    handle = adacache.enable(subject.model, path, budget=6)
    subject.generate("d", 3)
    entry = values["budgets"]["6"]
    assert handle.trace.computed_steps == (
        entry["computed"] if entry["use"] == "cache" else list(range(1, 7))
    )


def test_factors_of_the_stack_are_chosen_in_runs() -> None:
    subject = small_subject()
    found = calibrate_paths(subject, ["a", "b"], [], budgets=[5], refine=1, probed=2, level="stack")
    budget = found.budgets[5]
    assert set(budget.calibration) == {"stack", "stack, refitted x 1", "stack, refitted x 0.5"}
    assert budget.calibration[budget.fit] == max(budget.calibration.values())
    policy = PlannedPath([step + 1 for step in budget.path], budget.factors, "stack")
    adacache.enable(subject.model, policy)
    made = [subject.generate(prompt, seed) for seed, prompt in enumerate(["a", "b"])]
    adacache.disable(subject.model)
    full = [subject.generate(prompt, seed) for seed, prompt in enumerate(["a", "b"])]
    peak = max(float(one.max() - one.min()) for one in full)
    scores = [psnr(*pair, peak) for pair in zip(made, full, strict=True)]
    assert np.mean(scores) == pytest.approx(budget.calibration[budget.fit], abs=0.01)


def test_interrupted_calibration_resumes(tmp_path: Path) -> None:
    plain = small_subject()
    arguments: dict[str, Any] = {"budgets": [5], "refine": 1}
    expected = calibrate_paths(plain, ["a", "b"], [], **arguments)
    calls: list[int] = []

    def generate(prompt: Any, seed: int) -> Tensor:
        calls.append(seed)
        if calls == [0, 1]:
            raise KeyboardInterrupt("interrupted")
        return plain.generate(prompt, seed)

    subject = replace(plain, generate=generate)
    with pytest.raises(KeyboardInterrupt):
        calibrate_paths(subject, ["a", "b"], [], work=tmp_path / "work", **arguments)
    assert [file.name for file in (tmp_path / "work").iterdir()] == ["run_0.pt"]
    found = calibrate_paths(subject, ["a", "b"], [], work=tmp_path / "work", **arguments)
    assert found.budgets[5].path == expected.budgets[5].path
    np.testing.assert_allclose(found.budgets[5].factors, expected.budgets[5].factors, rtol=1e-3)
    assert not (tmp_path / "work").exists()


def test_kept_runs_of_another_calibration_are_refused(tmp_path: Path) -> None:
    subject = small_subject()
    with pytest.raises(KeyboardInterrupt):
        calibrate_paths(
            subject,
            ["a"],
            [],
            budgets=[5],
            work=tmp_path,
            say=lambda line: (_ for _ in ()).throw(KeyboardInterrupt),
        )
    with pytest.raises(ValueError, match=r"work: .*run_0.pt is of another calibration \(WanPipeline 10 a\)"):
        calibrate_paths(subject, ["b"], [], budgets=[5], work=tmp_path)


def test_a_sampler_that_cannot_be_repeated_is_refused() -> None:
    subject = small_subject()
    noise = torch.Generator().manual_seed(0)

    class Noisy(type(subject.model.scheduler)):
        def step(self, model_output: Any, timestep: Any, sample: Any, return_dict: bool = True) -> Any:
            (result,) = super().step(model_output, timestep, sample, return_dict=False)
            return (result + 0.1 * torch.randn(result.shape, generator=noise),)

    subject.model.scheduler = Noisy.from_config(subject.model.scheduler.config)
    with pytest.raises(ValueError, match=r"scheduler: repeating the steps of Noisy .* cannot be calibrated"):
        calibrate_paths(subject, ["a"], [], budgets=[5])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "prompts: expected at least one"),
        ({"budgets": [11]}, r"budgets: expected a whole number in 1\.\.10, got 11"),
        ({"budgets": [0]}, "budgets: expected a whole number"),
        ({"level": "block"}, "level: expected one of guided, branch, stack"),
        ({"probed": 3}, r"probed: expected a whole number in 1\.\.2, got 3"),
        ({"refine": 0}, "refine: expected a whole number of at least 1"),
    ],
    ids=["prompts", "large", "none", "level", "probed", "refine"],
)
def test_bad_arguments(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"prompts": ["a", "b"], "held_out": [], **changes}
    with pytest.raises(ValueError, match=message):
        calibrate_paths(small_subject(), **arguments)


def test_a_model_without_a_scheduler_is_refused() -> None:
    subject = small_subject()
    bare = Subject(subject.model.transformer, subject.generate, STEPS, "bare")
    with pytest.raises(ValueError, match="scheduler: expected an object with a method step"):
        calibrate_paths(bare, ["a"], [])


def test_another_number_of_steps_is_refused() -> None:
    subject = replace(small_subject(), num_steps=7)
    with pytest.raises(ValueError, match=r"model: expected 7 steps of FlowMatch.* in one generation, got 10"):
        calibrate_paths(subject, ["a"], [])


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, plot = tmp_path / "paths.json", tmp_path / "paths.png"
    given = ["test_calibrate_paths:cli_subject", "--count", "2", "--held-out", "1", "--budgets", "5,3"]
    options = ["--refine", "1", "--num-steps", "8", "--out", str(out), "--plot", str(plot)]
    assert main(["calibrate", *given, *options]) == 0
    printed = capsys.readouterr()
    assert "fewer steps dB" in printed.out
    assert f"adacache.enable(model, '{out}', num_steps=8, budget=5)" in printed.out
    assert "full run 2 of 2" in printed.err
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert not out.with_name("paths.json.work").exists()
    assert main(["calibrate", given[0], "--method", "path", "--share", ".5"]) == 2
    assert "--share: expected with --method codebook only" in capsys.readouterr().err
    assert main(["calibrate", given[0], "--method", "codebook", "--budgets", "5"]) == 2
    assert "--budgets: expected with --method path only" in capsys.readouterr().err

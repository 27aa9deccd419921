# SPDX-License-Identifier: Apache-2.0
"""`adacache calibrate`: recordings equal runs, and the codebook has a smaller error than the published
one."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import adacache
import numpy as np
import pytest
import torch
from adacache.calibration import (
    Record,
    Recording,
    Subject,
    calibrate,
    choose,
    even_schedule,
    probe,
    record,
    scale,
    subject_of,
    write,
)
from adacache.commands.cli import main
from adacache.commands.subjects import SUBJECTS
from adacache.policies.presets import preset
from model_cases import COGVIDEOX, LATTE, Case
from pipeline_cases import PIPELINES
from torch import Tensor

STEPS = 16
PUBLISHED = dict(preset("open-sora/fast", 30).codebook)


def subject(case: Case) -> Subject:
    """A random network with converging timesteps, so that the change of its residuals decreases as in trained
    networks."""
    model = case.model()

    @torch.no_grad()
    def generate(prompt: int, seed: int) -> Tensor:
        values = case.values(seed=prompt)
        torch.manual_seed(seed)
        z = torch.randn_like(values[case.latents])
        for step in range(STEPS):
            timed = replace(case, schedule=10.0 * (1 - step / STEPS) ** 3)
            z = z - timed.predict(model, values, z, 0, STEPS) / STEPS
        return z

    return Subject(model, generate, STEPS, case.name)


def calibrate_small(case: Case) -> dict[str, Any]:
    return calibrate(subject(case), [1, 2, 3, 4], [5, 6, 7], share=0.5, say=lambda _: None)


def assert_better(held_out: dict[str, Any]) -> None:
    chosen, scaled = held_out["chosen"], held_out["scaled"]
    assert chosen["error"] < scaled["error"]
    assert chosen["steps"] <= scaled["steps"] + 0.5


@pytest.mark.parametrize("case", [LATTE, COGVIDEOX], ids=lambda case: case.name)
def test_better_than_the_published_codebook(case: Case) -> None:
    """On held-out prompts the error is smaller than that of the Open-Sora codebook scaled to the same number
    of computed steps."""
    pytest.importorskip("diffusers")
    found = calibrate_small(case)
    assert_better(found["held_out"])
    chosen = found["held_out"]["chosen"]
    assert chosen["predicted_steps"] <= 0.5 * STEPS + 1
    assert chosen["steps"] == pytest.approx(chosen["predicted_steps"], abs=1)
    assert chosen["error"] == pytest.approx(chosen["predicted_error"], rel=0.25)


def test_recorded_distances_match_a_run() -> None:
    pytest.importorskip("diffusers")
    one = subject(LATTE)
    recording, _ = record(one, [1], [0], Record(tokens=1 << 20))
    handle = adacache.enable(
        one.model, adacache.AdaCache(codebook={99.0: 3}), num_steps=STEPS, rows_per_video=1
    )
    one.generate(1, 0)
    trace = handle.trace
    adacache.disable(one.model)
    assert recording.computed(adacache.AdaCache(codebook={99.0: 3}))[0].nonzero()[0].tolist() == [
        step - 1 for step in trace.computed_steps
    ]
    # The first distance is between steps that are consecutive in the recording.
    ((_, measured),) = trace.series("distance").items()
    assert measured[0][1] == pytest.approx(recording.distances[0, 0, 1], rel=1e-5)
    ((_, motion),) = trace.series("motion").items()
    assert motion[0][1] == pytest.approx(recording.motion[0, 1], rel=1e-5)


def synthetic(videos: int = 3, steps: int = 12) -> Recording:
    """One-dimensional residuals, which change most in the middle of the schedule."""
    speed = 0.1 + np.exp(-((np.arange(steps) - steps / 2) ** 2) / 4)
    place = np.cumsum(speed)[None] * np.linspace(0.5, 1.5, videos)[:, None]
    distances = np.full((videos, steps, steps), np.nan)
    i, j = np.triu_indices(steps, 1)
    distances[:, i, j] = place[:, j] - place[:, i]
    products = place[:, :, None] * place[:, None]
    return Recording(distances, np.zeros((videos, steps)), products)


def test_error_of_a_schedule() -> None:
    recording = synthetic(videos=2, steps=6)
    computed = np.array([[True, True, False, False, True, True], [True, True, True, False, True, True]])
    place = np.sqrt(recording.products[:, range(6), range(6)])
    off = place[:, [2, 3]] - place[:, [1, 1]]
    off[1] = [0, place[1, 3] - place[1, 2]]
    np.testing.assert_allclose(recording.errors(computed), off.sum(1) / 6)
    assert recording.loss(computed) == pytest.approx(off.sum(1).mean() / 6)
    sensitive = replace(recording, sensitivity=np.array([9.0, 9.0, 2.0, 0.5, 9.0, 9.0]))
    np.testing.assert_allclose(sensitive.errors(computed), off @ np.array([2.0, 0.5]))
    both = np.stack([computed, np.ones_like(computed)])
    np.testing.assert_allclose(sensitive.errors(both), [off @ np.array([2.0, 0.5]), [0, 0]], atol=1e-12)


def test_errors_may_cancel() -> None:
    """Residuals that change back and forth."""
    place = np.array([0.0, 1.0, 2.0, 0.0, 1.0])
    recording = Recording(np.zeros((1, 5, 5)), np.zeros((1, 5)), np.outer(place, place)[None])
    assert recording.errors(np.array([[True, True, False, True, True]])) == pytest.approx(1 / 5)
    assert recording.errors(np.array([[True, True, False, False, True]])) == pytest.approx(0)


def test_even_schedules() -> None:
    assert even_schedule(8, 3).tolist() == [True, False, False, False, True, False, False, True]
    assert even_schedule(8, 8).all()
    assert even_schedule(8, 1).tolist() == [True] + 7 * [False]


def test_sensitivity_matches_the_output() -> None:
    """A subject whose output is a weighted sum of its residuals, with larger weights for the last steps."""
    weights = np.array([1.0] * 6 + [3.0] * 6)
    recording = synthetic(videos=1)
    place = np.sqrt(recording.products[0, range(12), range(12)])

    def output(schedule: np.ndarray[Any, Any]) -> Tensor:
        source = np.maximum.accumulate(np.where(schedule, np.arange(12), 0))
        return torch.tensor([100 + weights @ place[source]])

    full = output(np.ones(12, dtype=bool))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "adacache.calibration.runs.run",
            lambda _, policy, *__: (output(np.isin(np.arange(12) + 1, policy.computed[0])), 0),
        )
        found = probe(Subject(None, lambda *_: full, 12, "sum"), [0], [0], [full], recording)
    assert found.sensitivity is not None
    schedule = even_schedule(12, 5)
    expected = float((output(schedule) - full).abs() / full.abs())
    assert found.errors(schedule[None])[0] == pytest.approx(expected, rel=0.2)
    assert found.sensitivity[9] > 2 * found.sensitivity[2]


def test_choice() -> None:
    recording = synthetic()
    by_share = choose(recording, share=0.6)
    computed = recording.computed(by_share)
    assert computed.mean() <= 0.6
    published = scale(recording, adacache.AdaCache(codebook=PUBLISHED), 0.5)
    assert 0.5 <= recording.computed(published).mean() <= 0.6
    assert recording.loss(computed) <= recording.loss(recording.computed(published))
    by_error = choose(recording, error=0.1)
    assert recording.loss(recording.computed(by_error)) <= 0.1
    with pytest.raises(ValueError, match=r"share: no codebook reaches share=0\.01"):
        choose(recording, share=0.01)
    with pytest.raises(ValueError, match="share: expected either share or error"):
        choose(recording)


def test_enable_reads_the_file(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    path = tmp_path / "latte.json"
    write(path, {"codebook": [[0.5, 3], [1.0, 2], [9.0, 1]], "num_steps": STEPS, "metric_part": None})
    model = LATTE.model()
    for given in (path, str(path)):
        handle = adacache.enable(model, given, num_steps=STEPS, rows_per_video=1)
        assert handle.policy.codebook == {0.5: 3, 1.0: 2, 9.0: 1}
        LATTE.denoise(model, LATTE.values(), STEPS)
        adacache.disable(model)
    with pytest.raises(ValueError, match="was calibrated for 16 steps, got 20"):
        adacache.enable(model, path, num_steps=20)
    path.write_text("{}")
    with pytest.raises(ValueError, match="not a file that `adacache calibrate` wrote"):
        adacache.enable(model, path, num_steps=STEPS)


def small_subject(num_steps: int | None) -> tuple[Subject, list[int]]:
    return subject(LATTE), list(range(6))


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("diffusers")
    out = tmp_path / "found.json"
    given = [
        "test_calibrate:small_subject",
        "--share",
        "0.6",
        "--count",
        "2",
        "--held-out",
        "2",
        "--out",
        str(out),
    ]
    assert main(["calibrate", *given]) == 0
    printed = capsys.readouterr().out
    assert "on 2 held-out prompts" in printed
    assert "evenly spaced" in printed
    found = json.loads(out.read_text())
    assert found["num_steps"] == STEPS
    assert set(found["held_out"]["chosen"]) == {
        "predicted_steps",
        "steps",
        "predicted_error",
        "error",
        "even_error",
        "gain",
    }
    assert adacache.preset(out, STEPS).codebook == dict(found["codebook"])
    assert main(["calibrate", "test_calibrate:small_subject", "--count", "9"]) == 2
    assert "expected at least 13" in capsys.readouterr().err
    with pytest.raises(ValueError, match="model: expected the folder"):
        subject_of("no such thing")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"share": 0.5, "error": 0.1}, "share, error, like: expected exactly one"),
        ({}, "share, error, like: expected exactly one"),
        ({"share": float("nan")}, "share: expected a number above 0 and at most 1"),
        ({"share": 0.1}, "share: expected at least 5 of 16 steps"),
        ({"error": -1.0}, "error: expected a number above 0"),
        ({"share": 0.5, "seed": -1}, "seed: expected a whole number of at least 0"),
        ({"share": 0.5, "probed": True}, "probed: expected a whole number of at least 0"),
        ({"share": 0.5, "prompts": []}, "prompts, held_out: expected some of each, got 0, 1"),
        ({"like": "open-sora/medium"}, "policy: expected one of"),
    ],
    ids=str,
)
def test_invalid_arguments_raise_before_any_run(wrong: dict[str, Any], message: str) -> None:
    one = Subject(None, lambda *_: pytest.fail("work began"), STEPS, "none")
    with pytest.raises(ValueError, match=message):
        calibrate(one, **{"prompts": [1], "held_out": [2], **wrong})
    for tokens in (0, 1.5, True):
        with pytest.raises(ValueError, match="tokens: expected a whole number of at least 1"):
            Record(tokens=tokens)


def test_subjects_that_do_not_run_the_model() -> None:
    pytest.importorskip("diffusers")
    one = subject(LATTE)
    with pytest.raises(RuntimeError, match="no generation call has run"):
        record(replace(one, generate=lambda *_: torch.ones(1)), [1], [0], Record())
    with pytest.raises(ValueError, match="generate: expected a tensor, got None"):
        record(replace(one, generate=lambda *_: None), [1], [0], Record())


def encode_prompt(prompt: str, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    """Replaces the text encoder: returns embeddings that depend on the prompt."""
    generator = torch.Generator().manual_seed(sum(prompt.encode()))
    embeddings = torch.randn(2, 1, 5, 12, generator=generator)
    return embeddings[0], 0.5 * embeddings[1]


def test_command_on_a_saved_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    diffusers = pytest.importorskip("diffusers")
    pipeline = next(case for case in PIPELINES if case.name == "WanPipeline").build()
    pipeline.encode_prompt = encode_prompt
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *_, **__: pipeline)
    (tmp_path / "prompts.txt").write_text("a cat\n\n  a dog \na $ sign\n")
    (tmp_path / "saved").mkdir()
    out = tmp_path / "wan.json"
    options = f"--prompts {tmp_path}/prompts.txt --count 2 --held-out 1 --num-steps 12 --share .7".split()
    options += ["--out", str(out)]
    size = json.dumps({"height": 32, "width": 32, "num_frames": 9})
    assert main(["calibrate", str(tmp_path / "saved"), *options, "--arguments", size]) == 0
    assert "chosen, on 1 held-out prompts" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["model"] == "WanPipeline"
    assert found["prompts"] == 2
    handle = adacache.enable(pipeline, out)
    pipeline(prompt="a cat", num_inference_steps=12, output_type="latent", height=32, width=32, num_frames=9)
    assert 4 <= len(handle.trace.computed_steps) < 12
    adacache.disable(pipeline)
    for arguments, message in {
        '{"prompt": "a cow"}': "arguments: expected none of generator, .*got 'prompt'",
        '{"fps": 8}': "arguments: expected arguments of WanPipeline, got 'fps'",
    }.items():
        assert main(["calibrate", str(tmp_path / "saved"), *options, "--arguments", arguments]) == 2
        assert re.search(message, capsys.readouterr().err)


@pytest.mark.slow
def test_better_than_the_published_codebook_on_the_digit_model() -> None:
    found_subject, prompts = subject_of(SUBJECTS["digits"])
    found = calibrate(found_subject, prompts[:6], prompts[6:12], share=0.4)
    assert_better(found["held_out"])
    chosen = found["held_out"]["chosen"]
    assert chosen["gain"] > max(0.1, found["held_out"]["known"]["gain"])
    assert chosen["steps"] <= 0.4 * 30 + 0.5
    assert chosen["error"] == pytest.approx(chosen["predicted_error"], rel=0.25)

# SPDX-License-Identifier: Apache-2.0
"""The presets of the digit model and the search that finds them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import adacache
import calibrate
import pytest
import torch
from adacache.commands import demo
from adacache.digits import WEIGHTS, sampler
from adacache.digits.captions import held_out_prompts, parse
from adacache.digits.subject import calibration_prompts, subject_of_model
from adacache.models.stdit3 import STDiT3
from adacache.policies import AdaCache, presets

STEPS = 6
PROMPTS = ("a 1 resting up over a plain background", "a 2 racing left over a noisy background")


@pytest.fixture(scope="module")
def model(tiny_digit_model: STDiT3) -> STDiT3:
    return tiny_digit_model


def test_codebooks_match_the_shipped_weights_and_sampler() -> None:
    calibrated = json.loads(presets.DIGIT_CODEBOOKS.read_text())
    assert calibrated["weights_sha256"] == hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
    flow = sampler()
    assert calibrated["sampler"] == {
        "num_steps": flow.num_steps,
        "guidance_scale": flow.guidance_scale,
        "use_timestep_transform": flow.use_timestep_transform,
    }
    used = {parse(prompt) for prompt, _ in calibrated["clips"]}
    assert not used & set(held_out_prompts())


def test_presets_of_the_digit_model() -> None:
    fast, slow = adacache.preset("digits/fast", 30), adacache.preset("digits/slow", 30)
    assert fast.motion is None
    assert list(fast.codebook.values()) == [6, 5, 4, 3, 2, 1]
    assert list(slow.codebook.values()) == [3, 2, 1, 1, 1, 1]
    regularised = adacache.preset("digits/fast+moreg", 30)
    assert regularised.codebook == fast.codebook
    assert regularised.motion is not None
    with pytest.raises(ValueError, match="num_steps"):
        adacache.preset("digits/fast", 29)


def test_recording_matches_the_measurements_of_a_run(model: STDiT3) -> None:
    flow = sampler(STEPS)
    prompts = [parse(prompt) for prompt in PROMPTS]
    clips = calibrate.record_clips(subject_of_model(model, flow), prompts, [5, 6])
    for video, prompt in enumerate(PROMPTS):
        clip, _, trace = demo.generate(model, flow, prompt, 5 + video, AdaCache({100.0: 1}))
        assert trace is not None
        torch.testing.assert_close((clips.outputs[video][0, 0] + 1) / 2, clip, atol=1e-5, rtol=0)
        for name, recorded in (
            ("distance", clips.recording.distances[video].diagonal(1)),
            ("motion", clips.recording.motion[video, 1:]),
        ):
            (curve,) = trace.series(name).values()
            assert [value for _, value in curve] == pytest.approx(recorded.tolist(), rel=1e-4)


def test_search_meets_its_targets_and_writes_presets(
    model: STDiT3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "FACTORS", calibrate.FACTORS[::40])
    monkeypatch.setattr(calibrate, "SCALES", calibrate.SCALES[::40])
    monkeypatch.setattr(calibrate, "POWERS", calibrate.POWERS[:2])
    monkeypatch.setattr(calibrate, "GRADIENT_WEIGHTS", calibrate.GRADIENT_WEIGHTS[:2])
    flow = sampler(30)
    subject = subject_of_model(model, flow)
    prompts = calibration_prompts(1)
    assert [prompt.motion for prompt in prompts] == ["resting", "drifting", "racing"]
    assert not set(prompts) & set(held_out_prompts())
    clips = calibrate.record_clips(subject, prompts, [0, 1, 2])
    lines: list[str] = []
    chosen = calibrate.find_presets(subject, clips, 13, 17, lines.append)
    for name, target in (("fast", 13), ("slow", 17)):
        policy, results = chosen[f"digits/{name}"]
        simulated = clips.steps(policy)
        published = adacache.preset(f"open-sora/{name}", 30).codebook
        for factor in calibrate.FACTORS:
            other = AdaCache({edge * factor: rate for edge, rate in published.items()})
            assert abs(simulated - target) <= abs(clips.steps(other) - target) + 0.5
        assert results.mean_steps == pytest.approx(simulated, abs=2)
    assert len(lines) == 3 + len(calibrate.POWERS) + len(calibrate.GRADIENT_WEIGHTS) - 1

    (tmp_path / "weights").write_bytes(b"weights")
    written = tmp_path / "digits.json"
    calibrate.write_presets(written, chosen, flow, clips, tmp_path / "weights")
    monkeypatch.setattr(presets, "DIGIT_CODEBOOKS", written)
    for name, (policy, _) in chosen.items():
        assert adacache.preset(name, 30) == policy

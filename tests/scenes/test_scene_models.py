# SPDX-License-Identifier: Apache-2.0
"""The Wan and Latte examples: training, shipped weights, pipelines of diffusers."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import adacache
import pytest
import torch

pytest.importorskip("sklearn", reason="scikit-learn, which contains the handwritten digits, is not installed")
pytest.importorskip("diffusers", reason="diffusers, which defines the networks, is not installed")

import diffusers
from scenes import models
from scenes.captions import calibration_prompts
from scenes.models import CONFIGS, FRAMES, SIZE, call_arguments, latte_pipeline, load, noise, wan_pipeline
from scenes.train import Options, export, initialize, load_checkpoint, start, train

TINY: dict[str, dict[str, Any]] = {"wan": {"num_layers": 1, "ffn_dim": 64}, "latte": {"num_layers": 1}}
SOLVERS = {
    "wan unipc": "UniPCMultistepScheduler",
    "wan euler": "FlowMatchEulerDiscreteScheduler",
    "latte": "DDIMScheduler",
}


def pipeline(name: str) -> Any:
    model, _, solver = name.partition(" ")
    return wan_pipeline(solver) if model == "wan" else latte_pipeline()


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, changes in TINY.items():
        monkeypatch.setitem(CONFIGS, name, CONFIGS[name] | changes)


def options(name: str, **changes: Any) -> Options:
    values: dict[str, Any] = {"model": name, "steps": 4, "batch": 4, "warmup": 4, "log_every": 1}
    return Options(**({"compile": False} | values | changes))


@pytest.mark.parametrize("name", list(SOLVERS))
def test_pipelines_generate_clips_of_the_shipped_weights(name: str) -> None:
    pipe = pipeline(name)
    assert type(pipe) is (diffusers.LattePipeline if name == "latte" else diffusers.WanPipeline)
    assert type(pipe.scheduler).__name__ == SOLVERS[name]
    prompts = calibration_prompts(1)[:2]
    arguments = call_arguments(pipe, prompts, [3, 4]) | {"num_inference_steps": 2}
    clips = pipe(**arguments).frames
    assert clips.shape == (2, 1, FRAMES, SIZE, SIZE)
    assert clips.dtype == torch.float32
    assert clips.isfinite().all()
    # The pipelines create noise of the same shape.
    own = pipe(**arguments | {"latents": None, "generator": torch.Generator().manual_seed(0)}).frames
    assert own.shape == clips.shape


@pytest.mark.parametrize("name", list(CONFIGS))
def test_shipped_weights(name: str) -> None:
    model = load(name)
    assert type(model) is models.CLASSES[name]
    assert 1.5e6 < sum(p.numel() for p in model.parameters()) < 4e6
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in model.parameters())
    assert not model.training
    assert (models.FOLDER / f"{name}.safetensors").stat().st_size <= 8e6
    config = json.loads((models.FOLDER / f"{name}.json").read_text())
    assert config == json.loads(json.dumps(CONFIGS[name])), "the config of the training script has changed"


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="solver: expected 'unipc' or 'euler', got 'heun'"):
        wan_pipeline("heun")
    with pytest.raises(ValueError, match="seeds: expected one per prompt, got 1 for 2 prompts"):
        call_arguments(latte_pipeline(), calibration_prompts(1)[:2], [0])


def test_noise_of_a_seed() -> None:
    assert torch.equal(noise([4, 5])[1], noise([5])[0])
    assert abs(noise(range(8)).std() - 1) < 0.02


def test_latte_starts_from_noise() -> None:
    schedule = models.noise_schedule()
    schedule.set_timesteps(models.STEPS)
    first = schedule.alphas_cumprod[schedule.timesteps[0]]
    assert schedule.timesteps[0] == 999
    assert math.sqrt(first) < 0.01


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_new_network_returns_its_input(name: str) -> None:
    state = start(options(name))
    video = noise([0])
    caption = torch.randn(1, 9, 32)
    with torch.no_grad():
        output = state.model(
            hidden_states=video,
            timestep=torch.tensor([500]),
            encoder_hidden_states=caption,
            return_dict=False,
        )[0]
    tokens = torch.corrcoef(torch.stack((video.flatten(), output.flatten())))
    assert tokens[0, 1] > 0.8
    initialize(state.model)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_loss_falls_and_a_resumed_run_equals_an_uninterrupted_one(name: str, tmp_path: Path) -> None:
    whole = train(start(options(name, steps=24, learning_rate=5e-3)), tmp_path / "whole", progress=False)
    losses = [
        json.loads(line).get("loss")
        for line in (tmp_path / "whole" / "training.jsonl").read_text().splitlines()
    ]
    assert sum(losses[-6:]) < 0.7 * sum(losses[1:7]), losses
    train(start(options(name, steps=24, learning_rate=5e-3)), tmp_path / "parts", stop_at=5, progress=False)
    resumed = train(load_checkpoint(tmp_path / "parts"), tmp_path / "parts", progress=False)
    assert resumed.step == whole.step == 24
    for key, value in resumed.average.items():
        assert torch.equal(value, whole.average[key]), key
    weights, config, log = export(tmp_path / "parts", tmp_path / "shipped", every=4)
    assert (weights.name, config.name, log.name) == (
        f"{name}.safetensors",
        f"{name}.json",
        f"training_{name}.jsonl",
    )
    for key, value in load(name, weights).state_dict().items():
        torch.testing.assert_close(value, whole.average[key].half().float(), atol=0, rtol=0)


def test_shipped_paths_fit_the_pipeline() -> None:
    paths = Path(models.__file__).with_name("wan_unipc_paths.json")
    pipe = wan_pipeline("unipc")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # another scheduler, other timesteps, another shape
        handle = adacache.enable(pipe, paths, budget=8)
        pipe(**call_arguments(pipe, calibration_prompts(1)[:1], [0]))
    assert len(handle.trace.computed_steps) == 8

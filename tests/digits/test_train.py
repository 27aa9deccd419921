# SPDX-License-Identifier: Apache-2.0
"""Training of the digit model: the loss falls, runs resume bit-identically, errors name their cause."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("sklearn", reason="scikit-learn, which contains the handwritten digits, is not installed")

from adacache.digits import load, noise, with_null
from adacache.digits.captions import CHANNELS, TOKENS, encode
from adacache.models.config import SHAPE, read_config
from adacache.models.stdit3 import STDiT3Config
from train import CHECKPOINT, LOG, Options, export, load_checkpoint, main, start, train

TINY = STDiT3Config(
    depth=1,
    hidden_size=32,
    num_heads=2,
    in_channels=1,
    patch_size=(1, 8, 8),
    caption_channels=CHANNELS,
    model_max_length=TOKENS,
    pred_sigma=False,
    input_sq_size=32,
)


def options(**changes: Any) -> Options:
    values: dict[str, Any] = {"config": TINY, "steps": 12, "batch": 4, "warmup": 4, "log_every": 1}
    return Options(**({"compile": False} | values | changes))


def logged(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / LOG).read_text().splitlines()]


def test_the_loss_falls(tmp_path: Path) -> None:
    train(start(options(steps=60, learning_rate=3e-3)), tmp_path, progress=False)
    losses = [line["loss"] for line in logged(tmp_path) if "loss" in line]
    assert len(losses) == 60
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10]), losses


@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, bfloat16: bool) -> None:
    whole = train(start(options(bfloat16=bfloat16)), tmp_path / "whole", progress=False)
    train(start(options(bfloat16=bfloat16)), tmp_path / "parts", stop_at=5, progress=False)
    halfway = load_checkpoint(tmp_path / "parts")
    assert halfway.step == 5
    resumed = train(halfway, tmp_path / "parts", progress=False)
    assert resumed.step == whole.step == 12
    weights = whole.model.state_dict()
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, weights[name]), name
        assert torch.equal(resumed.average[name], whole.average[name]), name
    assert not torch.equal(resumed.average["x_embedder.proj.weight"], weights["x_embedder.proj.weight"])
    assert torch.equal(resumed.generator.get_state(), whole.generator.get_state())


def test_a_checkpoint_holds_the_whole_run(tmp_path: Path) -> None:
    state = train(start(options(steps=2)), tmp_path, progress=False)
    content = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert set(content) == {
        "format",
        "options",
        "model",
        "average",
        "optimizers",
        "generator",
        "step",
        "seconds",
    }
    assert set(content["model"]) == set(content["average"]) == set(state.model.state_dict())
    again = load_checkpoint(tmp_path)
    assert again.options == state.options
    assert (again.step, again.seconds, again.done) == (2, state.seconds, 1.0)


def test_a_resumed_log_has_each_step_once(tmp_path: Path) -> None:
    train(start(options(steps=6)), tmp_path, stop_at=3, progress=False)
    with open(tmp_path / LOG, "a") as log:
        log.write('{"step": 4, "loss": 9}\n')
    train(load_checkpoint(tmp_path), tmp_path, progress=False)
    assert [line["step"] for line in logged(tmp_path) if "step" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["start"] for line in logged(tmp_path) if "start" in line] == [0, 3]
    assert max(line.get("loss", 0) for line in logged(tmp_path)) < 9


def test_minutes_end_a_run(tmp_path: Path) -> None:
    state = train(start(options(steps=None, minutes=0.01)), tmp_path, progress=False)
    assert state.done == 1
    assert state.seconds < 30
    lines = logged(tmp_path)
    assert lines[0]["hardware"]["threads"] == torch.get_num_threads()
    assert lines[-1]["step"] == state.step


def test_learning_rate_warms_up_and_decays(tmp_path: Path) -> None:
    train(start(options(steps=20, warmup=5)), tmp_path, progress=False)
    rates = [line["lr"] for line in logged(tmp_path) if "lr" in line]
    assert rates[:5] == sorted(rates[:5])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] < 0.02 * max(rates)


def test_export_is_loaded_strictly_and_holds_the_average(tmp_path: Path) -> None:
    state = train(start(options(steps=5)), tmp_path, progress=False)
    weights, config, _ = export(tmp_path, tmp_path / "shipped", every=2)
    model = load(weights)
    assert read_config(config) == model.config == TINY
    assert next(model.parameters()).dtype == torch.float32
    for name, value in model.state_dict().items():
        assert torch.equal(value, state.average[name].half().float()), name
    assert [line["step"] for line in logged(tmp_path / "shipped") if "step" in line] == [2, 4, 5]
    y = with_null(model, encode(["a 3 racing up over a noisy background"]))
    assert y.shape == (2, 1, TOKENS, CHANNELS)
    with torch.no_grad():
        assert model(noise([7]).repeat(2, 1, 1, 1, 1), torch.full((2,), 1000.0), y).isfinite().all()


def test_bad_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file .*absent.safetensors"):
        load(tmp_path / "absent.safetensors")
    train(start(options(steps=1)), tmp_path, progress=False)
    weights, config, _ = export(tmp_path, tmp_path)
    config.unlink()
    with pytest.raises(FileNotFoundError, match=r"no file .*digits.json"):
        load(weights)
    STDiT3Config(**(vars(TINY) | {"hidden_size": 64})).to_json(config)
    with pytest.raises(ValueError, match=r"do not fit the model: .*expected .*64.*got .*32"):
        load(weights)


def test_configs_are_checked(tmp_path: Path) -> None:
    assert set(SHAPE) == set(STDiT3Config.__dataclass_fields__)
    path = tmp_path / "config.json"
    path.write_text('{"depth": 3, "patch_size": [1, 4, 4], "architectures": ["STDiT3"]}')
    assert read_config(path) == STDiT3Config(depth=3, patch_size=(1, 4, 4))
    for content, message in {
        '{"depth": 1e9}': r"config.json: depth: expected a whole number in 1..256, got 1000000000.0",
        '{"depth": true}': "depth: expected a whole number",
        '{"patch_size": [1, 2]}': "patch_size: expected a list of 3 items",
        '{"qk_norm": 1}': "qk_norm: expected true or false, got 1",
        "[1]": "expected an object",
    }.items():
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_config(path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn])
def test_weights_have_to_be_floating_point(tmp_path: Path, dtype: torch.dtype) -> None:
    train(start(options(steps=1)), tmp_path, progress=False)
    weights, _, _ = export(tmp_path, tmp_path)
    state = load_file(weights)
    name = next(iter(state))
    save_file({**state, name: state[name].to(dtype)}, weights)
    with pytest.raises(
        ValueError, match=rf"{re.escape(name)}: expected the type F64 or F32 or F16 or BF16, got"
    ):
        load(weights)


def test_bad_resumes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FileNotFoundError, match=r"resume: no checkpoint\.pt"):
        load_checkpoint(tmp_path)
    (tmp_path / CHECKPOINT).write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"resume: .*checkpoint.pt is not a checkpoint"):
        load_checkpoint(tmp_path)
    torch.save({"format": 1, "step": 3}, tmp_path / CHECKPOINT)
    with pytest.raises(ValueError, match=r"is not a checkpoint of this script .*options"):
        load_checkpoint(tmp_path)
    for arguments, message in {
        ("--out", str(tmp_path / "none"), "--resume"): "no checkpoint.pt",
        ("--out", str(tmp_path / "none")): "steps, minutes: expected at least one",
        ("--out", str(tmp_path), "--steps", "1"): "already contains a run",
    }.items():
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


def test_a_diverged_run_stops_and_keeps_its_last_checkpoint(tmp_path: Path) -> None:
    state = train(start(options(steps=4)), tmp_path, stop_at=2, progress=False)
    with torch.no_grad():
        state.model.final_layer.linear.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="loss at step 3 is nan"):
        train(state, tmp_path, progress=False)
    assert load_checkpoint(tmp_path).step == 2

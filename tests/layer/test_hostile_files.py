# SPDX-License-Identifier: Apache-2.0
"""Files with one invalid field load or raise a ValueError that names the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import adacache
import hostile
import numpy as np
import pytest
import torch
from adacache.commands.verify import read_case
from adacache.models.config import read_config
from adacache.models.stdit3 import STDiT3, STDiT3Config
from adacache.models.weights import check_safetensors
from adacache.policies import presets
from models import GOLDEN, denoise, inputs

CALIBRATION = {
    "made_by": "adacache calibrate",
    "model": "digits",
    "num_steps": 30,
    "metric_block": 1,
    "metric_part": "temporal_attention",
    "metric": "l1",
    "codebook": [[0.5, 3], [1.0, 2], [9.0, 1]],
    "held_out": {"chosen": {"error": 0.1}},
}


def refused(values: Any, path: Path, read: Callable[[], Any]) -> int:
    """Number of variants of `values` that raise ValueError; other exceptions propagate."""
    count = 0
    for variant in hostile.variants(values):
        path.write_text(json.dumps(variant))
        messages: list[str] = []
        try:
            read()
        except ValueError as error:
            messages.append(str(error))
        for message in messages:
            assert path.name in message, variant
            assert "\x1b" not in message, variant
        count += len(messages)
    return count


def test_traces(model: STDiT3, tmp_path: Path) -> None:
    handle = adacache.enable(model, adacache.AdaCache(codebook={99.0: 3}), num_steps=6)
    denoise(model, inputs(1), 6)
    path = tmp_path / "trace.json"
    handle.trace.save(path)
    values = json.loads(path.read_text())
    assert refused(values, path, lambda: adacache.Trace.load(path)) > 600


def test_calibrations(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    assert refused(CALIBRATION, path, lambda: adacache.preset(path, None)) > 100


@pytest.mark.parametrize(
    ("codebook", "message"),
    [
        ([[0.5, 2.7]], r"codebook\[0\]\[1\]: expected a whole number of at least 1, got 2.7"),
        ([[0.5, True]], r"codebook\[0\]\[1\]: expected a whole number of at least 1, got True"),
        ([[0.5, 3], [0.5, 1]], r"codebook\[1\]\[0\]: expected a threshold above 0.5, got 0.5"),
        ([[0.5, 3], [0.4, 1]], r"codebook\[1\]\[0\]: expected a threshold above 0.5, got 0.4"),
        ([["0.5", 3]], r"codebook\[0\]\[0\]: expected a number above 0, got '0.5'"),
        ([[0.5]], r"codebook\[0\]: expected a list of 2 items"),
        ([], "codebook: expected a list of 1 or more items"),
    ],
)
def test_codebooks(codebook: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    path.write_text(json.dumps({**CALIBRATION, "codebook": codebook}))
    with pytest.raises(ValueError, match=rf"policy: not a file that .* wrote: .*found\.json: {message}"):
        adacache.preset(path, 30)


def test_calibrations_keep_the_measured_block(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    path.write_text(json.dumps(CALIBRATION))
    policy = adacache.preset(path, 30)
    assert policy == adacache.AdaCache(
        codebook={0.5: 3, 1.0: 2, 9.0: 1}, metric_blocks=[1], metric_part="temporal_attention"
    )


def test_digit_codebooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = json.loads(presets.DIGIT_CODEBOOKS.read_text())
    del values["clips"], values["sampler"]
    path = tmp_path / "digits.json"
    monkeypatch.setattr(presets, "DIGIT_CODEBOOKS", path)
    for name in ("measured", "measured_with_motion"):
        del values["presets"]["digits/fast"][name], values["presets"]["digits/slow"][name]
    assert refused(values, path, lambda: adacache.preset("digits/fast", None)) > 300


def test_configs(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    values = json.loads(json.dumps(asdict(STDiT3Config())))
    assert refused(values, path, lambda: read_config(path)) > 150


def test_weights(tmp_path: Path) -> None:
    """Flipped bytes in the safetensors header."""
    config = read_case(GOLDEN / "slow30_tattn.json").config
    with torch.device("meta"):
        model = STDiT3(config)
    original = next(GOLDEN.glob("weights_*.safetensors")).read_bytes()
    path = tmp_path / "weights.safetensors"
    generator = np.random.default_rng(0)
    count = 0
    for position in generator.integers(0, 4000, 300):
        data = bytearray(original)
        data[position] ^= int(generator.integers(1, 256))
        path.write_bytes(data)
        messages = []
        try:
            check_safetensors(model, path)
        except ValueError as error:
            messages.append(str(error))
        count += len(messages)
    assert count > 200

# SPDX-License-Identifier: Apache-2.0
"""Settings: validation, presets by name, windows in steps and fractions, replay."""

from __future__ import annotations

import math
from typing import Any

import adacache
import pytest
import torch
from adacache.adapters.stdit3 import STDIT3
from adacache.models.stdit3 import STDiT3
from models import CODEBOOK, denoise, inputs


@pytest.mark.parametrize(
    ("codebook", "message"),
    [
        ({}, "codebook: expected at least one"),
        ({0.2: 2, 0.1: 3}, r"codebook: expected ascending thresholds, got \[0.2, 0.1\]"),
        ({0.1: 0}, r"codebook: expected whole rates of at least 1 \(at threshold 0.1\), got 0"),
        ({0.1: 1.5}, r"codebook: expected whole rates of at least 1 .*, got 1.5"),
        ({0.1: True}, "codebook: expected whole rates"),
        ({0.1: 10**400}, r"codebook: expected whole rates of at least 1 .*, got 1000"),
        ({-0.1: 1}, "codebook: expected positive thresholds"),
        ({math.nan: 1}, "codebook: expected positive thresholds"),
        ({"0.1": 1}, "codebook: expected positive thresholds"),
    ],
)
def test_codebook_errors(codebook: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adacache.AdaCache(codebook=codebook)


@pytest.mark.parametrize("length", [1, 2, 6, 11])
def test_codebooks_of_any_length(model: STDiT3, length: int) -> None:
    codebook = {0.05 * (i + 1): length - i for i in range(length)}
    handle = adacache.enable(model, adacache.AdaCache(codebook=codebook), num_steps=12)
    denoise(model, inputs(1), 12)
    for record in handle.trace.measurements:
        score = record["distance"][0] / _rate_before(handle.trace, record["step"])
        assert record["rate"][0] == next((r for c, r in codebook.items() if score < c), 1)


def _rate_before(trace: adacache.Trace, step: int) -> int:
    rates = [record["rate"][0] for record in trace.measurements if record["step"] < step]
    return rates[-1] if rates else 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "guess"}, "rule: expected one of"),
        ({"metric": "linf"}, "metric: expected one of"),
        ({"cache": "all"}, "cache: expected one of"),
        ({"cache_dtype": torch.int8}, "cache_dtype: expected one of"),
        ({"cache_dtype": torch.float8_e4m3fn, "cache": "sublayer"}, "float8_e4m3fn needs cache='stack'"),
        ({"metric_part": "attention"}, "metric_part: expected one of"),
        ({"metric_blocks": []}, "metric_blocks: expected at least one block"),
        ({"metric_blocks": [4]}, r"metric_blocks: expected blocks in 0..3, got 4"),
        ({"metric_blocks": [2, 1]}, "metric_blocks: expected ascending blocks"),
    ],
)
def test_setting_errors(model: STDiT3, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adacache.enable(model, adacache.AdaCache(codebook=CODEBOOK, **settings), num_steps=30)
    assert not any(name.startswith("_adacache") for name in model.__dict__)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": (0, 5)}, r"window: expected 1 <= first <= last <= 30 steps, got \(0, 5\)"),
        ({"window": (4, 31)}, "window: expected 1 <= first"),
        ({"window": (9, 5)}, "window: expected 1 <= first"),
        ({"window": (0.5, 1.5)}, "window: expected fractions"),
        ({"window": (0.5, 3)}, "window: expected two steps"),
        ({"strides": ()}, "strides: expected whole numbers"),
        ({"strides": (0,)}, "strides: expected whole numbers"),
        ({"scale": 0.0}, "scale: expected a positive number"),
        ({"divisor": -1.0}, "divisor: expected a positive number"),
        ({"power": math.inf}, "power: expected a number of at least 0"),
    ],
)
def test_motion_errors(model: STDiT3, settings: dict[str, Any], message: str) -> None:
    def enable() -> None:
        motion = adacache.MotionRegularization(**settings)
        adacache.enable(model, adacache.AdaCache(codebook=CODEBOOK, motion=motion), num_steps=30)

    with pytest.raises(ValueError, match=message):
        enable()


def test_windows_in_steps_and_fractions() -> None:
    window = adacache.MotionRegularization(window=(4, 26))
    assert window.steps(30) == (4, 26)
    fractions = adacache.MotionRegularization(window=(4 / 30, 26 / 30))
    assert fractions.steps(30) == (4, 26)
    assert fractions.steps(60) == (8, 52)
    assert adacache.MotionRegularization(window=(0.0, 1.0)).steps(10) == (1, 10)


def test_single_frame_has_no_motion(model: STDiT3) -> None:
    """One frame has no motion: the schedule equals the schedule without motion regularization."""
    values = inputs(1, frames=1)
    traces = []
    for motion in (None, adacache.MotionRegularization()):
        handle = adacache.enable(model, adacache.AdaCache(codebook=CODEBOOK, motion=motion), num_steps=30)
        denoise(model, values, 30)
        traces.append(handle.trace)
        adacache.disable(model)
    assert traces[0].computed_steps == traces[1].computed_steps
    assert not any(flag for record in traces[1].measurements for flag in record["nonfinite"])


def test_presets() -> None:
    for name in ("open-sora/fast", "open-sora/slow", "open-sora/fast+moreg", "open-sora/slow+moreg"):
        assert name in adacache.preset_names()
        for steps in (30, 100):
            policy = adacache.preset(name, steps)
            assert (policy.motion is not None) == name.endswith("+moreg")
    assert adacache.preset("open-sora/fast", 30).codebook == CODEBOOK
    assert adacache.preset("open-sora/fast", 100).codebook == {
        0.03: 12,
        0.05: 10,
        0.07: 8,
        0.09: 6,
        0.11: 4,
        1.0: 3,
    }
    motion = adacache.preset("open-sora/fast+moreg", 100).motion
    assert motion is not None
    assert motion.steps(100) == (10, 90)
    with pytest.raises(
        ValueError, match=r"policy: expected one of \['open-sora/fast'.*got 'open-sora/medium'"
    ):
        adacache.preset("open-sora/medium", 30)
    with pytest.raises(
        ValueError, match=r"num_steps: open-sora/fast has codebooks for \[30, 100\] steps, got 50"
    ):
        adacache.preset("open-sora/fast", 50)


def test_middle_block_is_measured_by_default() -> None:
    with torch.device("meta"):
        sites = STDIT3.sites(STDiT3())
    watched = adacache.AdaCache(codebook=CODEBOOK).watched(sites)
    assert [sites.name(site) for site in watched] == ["temporal_blocks.13.temporal_attention"]


def test_replay(model: STDiT3) -> None:
    values = inputs(2, seed=1)
    values["z"][1] *= 3.0
    values["y"][[0, 2]] *= 2.5
    handle = adacache.enable(model, adacache.AdaCache(codebook=CODEBOOK), num_steps=30)
    with handle.request(num_videos=2):
        first = denoise(model, values, 30)
    trace = handle.trace
    adacache.disable(model)

    handle = adacache.enable(model, adacache.Replay(trace), num_steps=30)
    with handle.request(num_videos=2):
        assert torch.equal(denoise(model, values, 30), first)
    assert [handle.trace.steps_of(v) for v in range(2)] == [trace.steps_of(v) for v in range(2)]
    with (
        pytest.raises(ValueError, match="num_videos: the trace has 2 videos, got 1"),
        handle.request(num_videos=1),
    ):
        denoise(model, inputs(1), 30)
    adacache.disable(model)

    handle = adacache.enable(model, adacache.Replay([1, 4, 9], cache="sublayer"), num_steps=10)
    denoise(model, inputs(1), 10)
    assert handle.trace.computed_steps == [1, 4, 9]
    with handle.request(num_videos=2):
        denoise(model, values, 10)
    assert handle.trace.computed_steps == [1, 4, 9]
    adacache.disable(model)
    with pytest.raises(ValueError, match="num_steps: the trace has 30 steps, got 20"):
        adacache.enable(model, adacache.Replay(trace), num_steps=20)
    with pytest.raises(ValueError, match="computes step 9, got a schedule of 8"):
        adacache.enable(model, adacache.Replay([1, 9]), num_steps=8)
    with pytest.raises(ValueError, match="rise from 1"):
        adacache.Replay([2, 3])

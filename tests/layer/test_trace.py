"""Traces: save, load, plot."""

from __future__ import annotations

from pathlib import Path

import adacache
import pytest
from adacache.models.stdit3 import STDiT3
from models import CODEBOOK, denoise, inputs
from PIL import Image


@pytest.fixture
def trace(model: STDiT3) -> adacache.Trace:
    motion = adacache.MotionRegularization(window=(0.1, 0.9), scale=0.04, power=2.0)
    handle = adacache.enable(model, adacache.AdaCache(codebook=CODEBOOK, motion=motion), num_steps=12)
    with handle.request(num_videos=2):
        denoise(model, inputs(2), 12)
    return handle.trace


def test_contents(trace: adacache.Trace) -> None:
    assert trace.num_steps == len(trace.computed) == 12
    assert trace.timesteps[0] == 1000
    assert trace.timesteps == sorted(trace.timesteps, reverse=True)
    assert trace.policy["motion"]["scale"] == 0.04
    site = "temporal_blocks.1.temporal_attention"
    for video in range(2):
        steps = [step for step, _ in trace.series("distance", video)[site]]
        assert steps == trace.steps_of(video)[1:]
        assert all(0 < value < 1 for _, value in trace.series("motion", video)[site])
    with pytest.raises(ValueError, match=r"video: expected 0..1, got 2"):
        trace.steps_of(2)


def test_save_and_load(trace: adacache.Trace, tmp_path: Path) -> None:
    trace.save(tmp_path / "t.json")
    assert adacache.Trace.load(tmp_path / "t.json") == trace
    for text in ("", "[]", '{"format": 7}', '{"format": 1, "extra": 1}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match="is no saved trace"):
            adacache.Trace.load(tmp_path / "bad.json")


def test_plot(trace: adacache.Trace, tmp_path: Path) -> None:
    trace.plot(tmp_path / "t.png")
    with Image.open(tmp_path / "t.png") as image:
        assert image.width > 600
        assert len(set(image.convert("RGB").resize((100, 100)).tobytes())) > 20

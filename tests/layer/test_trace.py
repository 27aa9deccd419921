# SPDX-License-Identifier: Apache-2.0
"""Traces: save, load, plot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adacache
import numpy as np
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
    for video in (2, -1, 1.0, True):
        with pytest.raises(ValueError, match=r"video: expected a whole number in 0..1, got "):
            trace.steps_of(video)
        with pytest.raises(ValueError, match=r"video: expected a whole number in 0..1, got "):
            trace.series("distance", video)


def test_save_and_load(trace: adacache.Trace, tmp_path: Path) -> None:
    trace.save(tmp_path / "t.json")
    assert adacache.Trace.load(tmp_path / "t.json") == trace
    for text in ("", "[]", '{"format": 7}', '{"format": 1, "extra": 1}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match="not a saved trace"):
            adacache.Trace.load(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(num_steps=12.0), "num_steps: expected a whole number of at least 1, got 12.0"),
        (lambda v: v.update(num_videos=True), "num_videos: expected a whole number"),
        (lambda v: v.update(num_videos=3), r"computed\[0\]: expected a list of 3 items"),
        (lambda v: v.update(num_steps=11), "computed: expected a list of 0..11 items"),
        (
            lambda v: v["computed"].__setitem__(0, [1, 1]),
            r"computed\[0\]\[0\]: expected true or false",
        ),
        (lambda v: v["timesteps"].pop(), "timesteps: expected a list of 12 items"),
        (lambda v: v["timesteps"].__setitem__(0, "1000"), r"timesteps\[0\]: expected a number, got '1000'"),
        (lambda v: v["measurements"][1].update(step=13), r"measurements\[1\].step: expected .* in 1..12"),
        (lambda v: v["measurements"][1].pop("site"), r"measurements\[1\].site: missing"),
        (
            lambda v: v["measurements"][0].update(distance=[1.0]),
            r"measurements\[0\].distance: expected a list",
        ),
        (
            lambda v: v["measurements"][0].update(motion=["a", 1]),
            r"measurements\[0\].motion\[0\]: expected",
        ),
        (lambda v: v.update(cache_bytes=-1), "cache_bytes: expected a whole number of at least 0"),
        (lambda v: v.update(policy=[]), "policy: expected an object"),
        (lambda v: v.pop("policy"), "policy: missing"),
    ],
)
def test_wrong_fields_are_named(
    trace: adacache.Trace, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    path = tmp_path / "t.json"
    trace.save(path)
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"trace: not a saved trace: .*t\.json: {message}"):
        adacache.Trace.load(path)


@pytest.mark.parametrize(
    "steps", [[1, 1.9], [1, 2.0], [1, True], [True], ["1"], "123", [], 7, None, [1, None]], ids=str
)
def test_replay_requires_integer_steps(steps: Any) -> None:
    with pytest.raises(ValueError, match=r"^trace(\[\d\])?: expected "):
        adacache.Replay(steps)
    assert adacache.Replay(np.array([1, 3])).computed == [[1, 3]]


def test_series_of_an_unmeasured_quantity(trace: adacache.Trace) -> None:
    for record in trace.measurements:
        del record["motion"]
    assert trace.series("motion") == {}
    with pytest.raises(ValueError, match="name: expected one of distance, motion, factor, rate, got 'speed'"):
        trace.series("speed")


def test_failed_plot_keeps_the_old_file(trace: adacache.Trace, tmp_path: Path) -> None:
    (tmp_path / "t.xyz").write_text("old")
    with pytest.raises(ValueError, match="xyz"):
        trace.plot(tmp_path / "t.xyz")
    assert (tmp_path / "t.xyz").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_plot(trace: adacache.Trace, tmp_path: Path) -> None:
    trace.plot(tmp_path / "t.png")
    with Image.open(tmp_path / "t.png") as image:
        assert image.width > 600
        assert len(set(image.convert("RGB").resize((100, 100)).tobytes())) > 20

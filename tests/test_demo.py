# SPDX-License-Identifier: Apache-2.0
"""The demo on a small random network: tables, report, errors."""

from __future__ import annotations

import importlib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adacache.commands import demo
from adacache.digits import FPS, SIZE, encode, noise, with_null
from adacache.digits.captions import held_out_prompts, parse
from adacache.models.stdit3 import STDiT3
from adacache.policies import AdaCache, MotionRegularization

STEPS = 6
PROMPTS = ("a 1 resting up over a plain background", "a 2 racing left over a noisy background")
METHODS = {
    demo.BASELINE: None,
    demo.FAST: AdaCache({100.0: 2}),
    demo.SLOW: AdaCache({100.0: 1}),
    demo.REGULARISED: AdaCache({100.0: 2}, motion=MotionRegularization(window=(2, 5))),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Several threads slow down tensors of this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tiny_digit_model: STDiT3) -> STDiT3:
    return tiny_digit_model


def run(out: Path, model: STDiT3, **options: Any) -> int:
    options = {"prompts": PROMPTS, "seeds_per_prompt": 2, "methods": METHODS, "num_steps": STEPS, **options}
    return demo.run(out, model=model, **options)


def test_writes_a_report_of_every_clip(
    model: STDiT3, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "new" / "folder", model) == 0
    text = (tmp_path / "new" / "folder" / "report.html").read_text()
    assert text.count("data:image/gif;base64,") == len(PROMPTS) * 2
    assert text.count("data:image/svg+xml;base64,") == len(METHODS) - 1
    printed = capsys.readouterr().out
    for name in METHODS:
        assert re.search(rf"^{re.escape(name)} .*\d x?", printed, re.MULTILINE), printed
    for motion in ("resting", "racing"):
        assert f"{motion}: steps" in printed
    clips = json.loads((tmp_path / "new" / "folder" / "results.json").read_text())["clips"]
    assert len(clips) == len(PROMPTS) * 2 * len(METHODS)
    assert {clip["computed"] for clip in clips if clip["method"] == demo.BASELINE} == {STEPS}
    # Steps 1 and 2; step 4 with rate 2; steps 5 and 6 are always computed.
    assert {tuple(clip["steps"]) for clip in clips if clip["method"] == demo.FAST} == {(1, 2, 4, 5, 6)}


def test_results_match_the_clips(model: STDiT3) -> None:
    flow = demo.sampler(STEPS)
    study = demo.compare(model, flow, PROMPTS, [3], METHODS, progress=False)
    assert "forward" not in model.__dict__, "AdaCache is still enabled"
    for prompt in PROMPTS:
        reference = flow.sample(
            model, noise([3]), with_null(model, encode([prompt])), fps=FPS, height=SIZE, width=SIZE
        )
        reference = (reference[0, 0].clamp(-1, 1) + 1) / 2
        by_method = {clip.method: clip for clip in study.clips if clip.prompt == prompt}
        assert torch.equal(by_method[demo.BASELINE].video, reference)
        for name in (demo.FAST, demo.REGULARISED):
            clip = by_method[name]
            error = (clip.video - reference).double().square().mean()
            assert error > 0
            assert clip.psnr == pytest.approx(float(-10 * error.log10()), abs=1e-3)
            assert clip.ssim is not None
            assert clip.ssim < 1
        # If every step is computed, the clip is identical.
        assert by_method[demo.SLOW].psnr == math.inf
    assert study.psnr(demo.FAST) == pytest.approx(sum(c.psnr or 0 for c in study.of(demo.FAST)) / 2)


def test_cache_bytes_of_both_layouts(model: STDiT3) -> None:
    flow = demo.sampler(STEPS)
    published = AdaCache({100.0: 2}, cache="sublayer")
    stack = demo.generate(model, flow, PROMPTS[0], 0, AdaCache({100.0: 2}))[2]
    sublayer = demo.generate(model, flow, PROMPTS[0], 0, published)[2]
    assert stack is not None
    assert sublayer is not None
    metric = stack.cache_bytes // 2
    assert stack.cache_bytes == 2 * metric
    assert sublayer.cache_bytes == demo.published_cache_bytes(model) + metric


def test_same_seeds_give_the_same_clips(model: STDiT3) -> None:
    first, second = (
        demo.compare(model, demo.sampler(STEPS), PROMPTS, [0], METHODS, progress=False) for _ in range(2)
    )
    assert all(torch.equal(a.video, b.video) for a, b in zip(first.clips, second.clips, strict=True))


def test_folder_that_cannot_be_created(
    model: STDiT3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "compare", lambda *_, **__: pytest.fail("the run started"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="out: cannot create the folder"):
        run(tmp_path / "file", model)
    with pytest.raises(OSError, match="out: cannot create the folder"):
        run(tmp_path / "file" / "below", model)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_steps": 0},
        {"num_steps": True},
        {"num_steps": 6.0},
        {"seeds_per_prompt": 0},
        {"threads": 0},
        {"prompts": []},
        {"methods": {}},
    ],
    ids=str,
)
def test_invalid_arguments_raise_before_any_work(
    model: STDiT3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any]
) -> None:
    monkeypatch.setattr(demo, "compare", lambda *_, **__: pytest.fail("the run started"))
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected a whole number of at least 1"):
        run(tmp_path / "new", model, **wrong)
    assert not (tmp_path / "new").exists()


def test_missing_packages_are_named(model: STDiT3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def without(name: str) -> Any:
        if name in ("torchmetrics", "PIL"):
            raise ImportError(name)
        return real(name)

    monkeypatch.setattr(importlib, "import_module", without)
    message = r"demo: torchmetrics, pillow missing; pip install 'adacache-kernels\[demo\]'"
    with pytest.raises(ImportError, match=message):
        run(tmp_path, model)


def test_missing_weights(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.safetensors.*digits/train\.py"):
        demo.run(tmp_path, weights=tmp_path / "none.safetensors")


def test_bad_prompt(model: STDiT3, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="prompt: word 2"):
        run(tmp_path, model, prompts=["a cat resting up over a plain background"])


def test_prompts_are_held_out_and_ordered_by_motion() -> None:
    motions = [parse(prompt).motion for prompt in demo.PROMPTS]
    assert motions == ["resting"] * 2 + ["drifting"] * 2 + ["racing"] * 2
    assert {parse(prompt) for prompt in demo.PROMPTS} <= set(held_out_prompts())
    backgrounds = [parse(prompt).background for prompt in demo.PROMPTS]
    assert backgrounds == backgrounds[:2] * 3, "motion classes differ in more than motion"

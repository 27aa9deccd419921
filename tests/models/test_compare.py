# SPDX-License-Identifier: Apache-2.0
"""`adacache compare`: methods by name, runs beside fewer steps, and the page."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import adacache
import pytest
import torch
from adacache.calibration import Subject, psnr
from adacache.commands.cli import main
from adacache.commands.comparison import compare, curves, frames, method_of, table
from adacache.policies import Named
from pipeline_cases import PIPELINES
from torch import Tensor

pytest.importorskip("diffusers", reason="diffusers is not installed")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

STEPS = 6
PATHS = Path(adacache.__file__).parent / "digits" / "paths.json"


def small_subject(num_steps: int | None = None) -> tuple[Subject, list[str]]:
    torch.manual_seed(0)
    case = next(case for case in PIPELINES if str(case) == "WanPipeline")
    pipeline, steps = case.build(), num_steps or STEPS

    def generate(prompt: Any, seed: int, steps: int = steps) -> Tensor:
        return case.generate(pipeline, steps, seed=seed)

    return Subject(pipeline, generate, steps, "small", generate_with=generate), ["a", "b", "<c>"]


def test_each_method_equals_its_own_run() -> None:
    subject, prompts = small_subject()
    methods = [method_of("Interval(interval=2)"), method_of("TaylorSeer(interval=3, order=1)")]
    found = compare(subject, prompts[:2], methods, seed=3)
    names = [one.method.name for one in found.outcomes]
    assert names == [
        "all steps",
        "Interval(interval=2)",
        "TaylorSeer(interval=3, order=1)",
        *["fewer steps"] * 2,
    ]
    full = [subject.generate("", 3 + number) for number in range(2)]
    for outcome, policy in zip(
        found.outcomes[1:3], (adacache.Interval(2), adacache.TaylorSeer(3, 1)), strict=True
    ):
        handle = adacache.enable(subject.model, policy)
        expected = [subject.generate("", 3 + number) for number in range(2)]
        adacache.disable(subject.model)
        assert all(map(torch.equal, outcome.clips, expected))
        peak = max(float(one.max() - one.min()) for one in full)
        assert outcome.psnr == pytest.approx([psnr(*pair, peak) for pair in zip(expected, full, strict=True)])
        assert outcome.computed == [len(handle.trace.computed_steps)] * 2
        assert outcome.cache_bytes == handle.trace.cache_bytes
    for outcome, count in zip(found.outcomes[3:], (3, 2), strict=True):
        assert outcome.computed == [count] * 2
        assert torch.equal(outcome.clips[1], subject.generate_with("", 4, count))  # type: ignore[misc]


def test_a_method_that_computes_all_steps_has_equal_clips() -> None:
    subject, prompts = small_subject()
    found = compare(subject, prompts[:1], [method_of("Interval(interval=1)")])
    assert [one.psnr for one in found.outcomes] == [[math.inf]] * 2, "no row of fewer steps"
    assert [row[4] for row in table(found)[1]] == ["same", "same"]
    assert curves(found) == {}


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("TeaCache(threshold=0.15)", adacache.TeaCache(threshold=0.15)),
        ("open-sora/fast", Named("open-sora/fast")),
        (f"{PATHS}(budget=10)", Named(PATHS, budget=10)),
        (f"{PATHS}(speedup=3.0)", Named(PATHS, speedup=3.0)),
    ],
)
def test_methods_by_name(text: str, settings: Any) -> None:
    assert method_of(text).settings == settings


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Taylor(interval=3)", r"expected a class \(AdaCache, .*\), a preset .* got 'Taylor\(interval=3\)'"),
        ("open-sora/medium", "expected a class"),
        ("TaylorSeer(3)", r"expected arguments such as \(interval=3, order=1\)"),
        ("TaylorSeer(interval=3", r"expected arguments such as"),
        ("TaylorSeer(interval=exit())", r"expected arguments such as"),
        ("TaylorSeer(every=3)", "unexpected keyword argument 'every'"),
        ("TaylorSeer(interval=0)", "interval: expected a whole number of at least 1, got 0"),
        ("missing.json(budget=3)", "policy: not a file that `adacache calibrate` wrote"),
        (f"{PATHS}(budget=3)", "budget: .* was calibrated for budgets"),
        (f"{PATHS}", "budget: expected either budget="),
    ],
)
def test_wrong_methods_are_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"--methods: .*{message}"):
        method_of(text)


def test_command_writes_table_page_and_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.syspath_prepend(Path(__file__).parent)
    out = tmp_path / "made" / "here"
    arguments = ["compare", "test_compare:small_subject", "--methods", "Interval(interval=2)"]
    assert main([*arguments, "--count", "3", "--num-steps", "4", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert "Interval(interval=2)" in printed.out
    assert "2.0 of 4" in printed.out
    assert "fewer steps, prompt 3 of 3: 2 of 4 steps" in printed.err
    results = json.loads((out / "compare.json").read_text())
    assert results["prompts"] == ["a", "b", "<c>"]
    assert [one["method"] for one in results["methods"]] == [
        "all steps",
        "Interval(interval=2)",
        "fewer steps",
    ]
    assert results["methods"][1]["settings"]["interval"] == 2
    page = (out / "compare.html").read_text()
    assert "latents, which cannot be shown" in page
    assert (out / "compare.png").stat().st_size > 1000


def test_page_shows_clips_of_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.syspath_prepend(Path(__file__).parent)
    arguments = ["compare", "test_compare:pixels", "--methods", "Interval(interval=2)", "--num-steps", "4"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    page = (tmp_path / "compare.html").read_text()
    assert page.count("data:image/gif;base64,") == 3 * 3
    assert "&lt;c&gt;" in page
    assert "<c>" not in page


def pixels(num_steps: int | None) -> tuple[Subject, list[str]]:
    """The latents' first channels as colors."""
    subject, prompts = small_subject(num_steps)
    plain = subject.generate

    def generate(prompt: Any, seed: int, steps: int = subject.num_steps) -> Tensor:
        return plain(prompt, seed, steps)[:, :3].tanh()  # type: ignore[call-arg]

    found = Subject(subject.model, generate, subject.num_steps, "pixels", generate_with=generate, peak=2.0)
    return found, prompts


def test_frames() -> None:
    grey, color = torch.rand(1, 1, 5, 8, 6), torch.rand(1, 3, 5, 8, 6)
    assert torch.equal(frames(grey), grey[0, 0])  # type: ignore[arg-type]
    assert torch.equal(frames(color), color[0].movedim(0, -1))  # type: ignore[arg-type]
    assert torch.equal(frames(color.movedim(1, 2)), color[0].movedim(0, -1))  # type: ignore[arg-type]
    torch.testing.assert_close(frames(2 * grey - 1), grey[0, 0])
    assert frames(torch.rand(1, 4, 5, 8, 6)) is None
    assert frames(torch.rand(2, 3, 5, 8, 6)) is None
    assert frames(torch.rand(3, 5, 8, 6)) is None


def test_prompts_are_needed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    assert main(["compare", "test_compare:without_prompts", "--out", str(tmp_path)]) == 2
    assert "--prompts: expected a file with at least one prompt" in capsys.readouterr().err


def without_prompts(num_steps: int | None) -> tuple[Subject, list[str]]:
    return small_subject(num_steps)[0], []

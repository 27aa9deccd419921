# SPDX-License-Identifier: Apache-2.0
"""The benchmark of models, at tiny width."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tool_loading import load

pytest.importorskip("diffusers", reason="diffusers is not installed")


FAMILIES = (
    *("latte", "cogvideox", "wan", "ltx", "hunyuan", "mochi"),
    *("allegro", "ltx2", "kandinsky", "cosmos", "sana"),
)


def test_the_families_that_are_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(load(monkeypatch, "benchmarks/models.py").FAMILIES) == set(FAMILIES)


@pytest.mark.parametrize("layers", [True, False], ids=["whole", "without_layers"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.sampled(2)
def test_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, family: str, layers: bool) -> None:
    models = load(monkeypatch, "benchmarks/models.py")
    file = tmp_path / "models.json"
    small = ["--tokens", "16", "--width", "12", "--repeat", "1", "--dtypes", "float32", "--families", family]
    models.main([*small, "--json", str(file), *(() if layers else ("--without-layers",))])
    rows = json.loads(file.read_text())["rows"]
    assert {row["family"] for row in rows} == {models.FAMILIES[family].name}
    for row in rows:
        assert row["ms"] > 0
        assert (row["kept_bytes"] > 0) == row["run"].startswith("AdaCache")
    runs = [row["run"] for row in rows]
    assert runs[0] == models.PLAIN
    assert models.REUSED in runs
    assert len(runs) == 7


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    models = load(monkeypatch, "benchmarks/models.py")
    monkeypatch.setattr("adacache.fused.residuals.residual", lambda y, *gate: 2 * y)
    monkeypatch.setattr("adacache.fused.residuals.fits", lambda x, y, *gate: False)
    with pytest.raises(SystemExit, match="gives another result"):
        models.main(["--tokens", "16", "--width", "12", "--families", "latte", "--dtypes", "float32"])

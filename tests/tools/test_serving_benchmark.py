# SPDX-License-Identifier: Apache-2.0
"""The serving benchmark, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tool_loading import load

pytest.importorskip("matplotlib")


def test_servers_are_compared(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_digit_model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    serving = load(monkeypatch, "benchmarks/serving.py")
    files = ["--json", str(tmp_path / "serving.json"), "--plot", str(tmp_path / "plots" / "serving.png")]
    arguments = ["--videos", "3", "--slots", "2", "--loads", "0.7,all", "--repeats", "2", *files]
    report = serving.main(arguments, tiny_digit_model)
    assert json.loads((tmp_path / "serving.json").read_text()) == report
    assert (tmp_path / "plots" / "serving.png").stat().st_size > 1000
    assert list(report["loads"]) == ["0.7", "all"]
    for rows in report["loads"].values():
        assert list(rows) == [
            serving.SLOTS,
            serving.ONE_PER_CALL,
            serving.ONE_BY_ONE,
            serving.NO_CACHE,
            serving.ONE_DECISION,
        ]
        assert rows[serving.ONE_BY_ONE]["largest_difference_from_one_by_one"] == 0
        assert rows[serving.SLOTS]["largest_difference_from_one_by_one"] < 1e-3
        assert rows[serving.SLOTS]["computed_steps"] == rows[serving.ONE_BY_ONE]["computed_steps"]
        assert rows[serving.NO_CACHE]["computed_steps"] == 30
        for row in rows.values():
            assert 0 < row["p50_s"] <= row["p95_s"]
            assert [len(latencies) for latencies in row["latencies_s"]] == [3, 3]
            assert row["videos_per_s_range"][0] <= row["videos_per_s"] <= row["videos_per_s_range"][1]
    printed = capsys.readouterr().out
    assert "load 0.7, 3 videos of 30 steps, 2 slots" in printed
    assert "load all" in printed


def test_latency_of_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    serving = load(monkeypatch, "benchmarks/serving.py")
    served = serving.in_turn(serving.Served({}, {0: 1, 1: 1, 2: 1}, {}), [2.0, 3.0, 1.0])([0.0, 1.0, 9.0])
    assert served.ended == {0: 2.0, 1: 5.0, 2: 10.0}
    arrivals = serving.arrivals_at(0.5, 2.0, 4000, 1)
    assert arrivals == sorted(arrivals)
    assert arrivals[-1] / 4000 == pytest.approx(4.0, rel=0.1)


def test_loads_are_checked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    serving = load(monkeypatch, "benchmarks/serving.py")
    with pytest.raises(SystemExit):
        serving.main(["--loads", "-1"])
    assert "--loads: expected positive numbers or all" in capsys.readouterr().err

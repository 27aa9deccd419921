# SPDX-License-Identifier: Apache-2.0
"""The scaling benchmark: its messages are those of real runs, and its arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tool_loading import load

pytest.importorskip("matplotlib")
pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo")


@pytest.fixture
def scaling(monkeypatch: pytest.MonkeyPatch) -> Any:
    return load(monkeypatch, "benchmarks/scaling.py")


def test_messages_of_a_run_are_those_of_the_model(
    scaling: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--json", str(tmp_path / "made" / "scaling.json"), "--plot", str(tmp_path / "scaling.png")]
    report = scaling.main(["--processes", "2", *files])
    assert json.loads((tmp_path / "made" / "scaling.json").read_text()) == json.loads(json.dumps(report))
    assert (tmp_path / "scaling.png").stat().st_size > 1000
    counted = report["counted_messages"]["2"]
    assert counted["computed_steps"] + counted["reused_steps"] == 12
    assert counted["computed"]["all_reduce"] == {"count": 1, "size": 72.0}
    assert counted["reused"] == {"all_gather": {"count": 1, "size": 8192.0}}
    rows = {row["gpus"]: row for row in report["rows"]}
    assert list(rows) == [1, 2, 4, 8, 16, 32, 64]
    assert rows[1]["baseline_s"] == pytest.approx(scaling.PUBLISHED["baseline"][1], rel=1e-6)
    assert rows[1]["adacache_s"] == pytest.approx(scaling.PUBLISHED["AdaCache"][1], rel=1e-6)
    assert rows[1]["loop_kept"] == rows[1]["kept"] == 1
    assert rows[8]["loop_kept"] >= scaling.GOAL
    assert "at 8 GPUs: 95%, predicted 99" in capsys.readouterr().out


def test_other_messages_are_an_error(scaling: Any) -> None:
    sizes = {"all_gather": [8192]}
    reused = {"computed": False, "count": {"all_gather": 1}, "bytes": sizes}
    with pytest.raises(RuntimeError, match="no step of the run on 2 processes was computed"):
        scaling.check_measured(2, [reused])
    computed = {"computed": True, "count": {"all_gather": 1}, "bytes": sizes}
    with pytest.raises(RuntimeError, match="2 processes, computed step: predicted"):
        scaling.check_measured(2, [computed, reused])


def test_seconds_of_messages(scaling: Any) -> None:
    machine = scaling.Machine(
        per_node=2, nvlink=100.0, network=10.0, nvlink_latency=1.0, network_latency=2.0, memory=1.0, flops=1.0
    )
    seconds = scaling.seconds_of
    assert seconds("all_to_all", scaling.Messages(3, 200.0), 2, machine) == 3 * (1 + 1)
    assert seconds("all_to_all", scaling.Messages(1, 200.0), 4, machine) == 1 + 2 + 2 * 50 / 10
    assert seconds("all_gather", scaling.Messages(1, 200.0), 4, machine) == 1 + 2 + 2 * 200 / 10
    assert seconds("all_reduce", scaling.Messages(1, 100.0), 2, machine) == 1 + 1
    assert seconds("border", scaling.Messages(1, 100.0), 4, machine) == 1 + 2 + 10


def test_one_gpu_sends_nothing(scaling: Any) -> None:
    network = scaling.small_network()
    assert scaling.messages(network, 1, True) == {}
    assert scaling.wire_bytes(network, 1, True) == {}
    half, quarter = (scaling.wire_bytes(network, gpus, True) for gpus in (2, 4))
    assert half["all_to_all"] == 4 * 4096 / 2
    assert quarter["all_to_all"] == 4 * 2048 * 3 / 4
    assert half["border"] == quarter["border"] == 1024

# SPDX-License-Identifier: Apache-2.0
"""The matrix of torch releases: a failing test, a release that does not install, and the table of both."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from tool_loading import load


@pytest.fixture
def matrix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The tool, with this Python for every release and with a passing and a failing test file."""
    matrix = load(monkeypatch, "tools/test_matrix.py")
    (tmp_path / "test_good.py").write_text("def test_good():\n    pass\n")
    (tmp_path / "test_bad.py").write_text(
        "def test_good():\n    pass\n\n\ndef test_bad():\n    assert False\n"
    )
    facts = {"versions": {"torch": "9.8.7", "triton": "6.5", "numpy": "3", "diffusers": "2"}, "missing": []}
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    monkeypatch.setattr(matrix, "PROBE", f"print({json.dumps(facts)!r})")
    monkeypatch.setattr(matrix, "environment", lambda asked: Path(sys.executable))
    return matrix


def run(matrix: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["test_matrix.py", *arguments])
    return int(matrix.main())


def test_failing_test_fails_the_run_and_is_named(
    matrix: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(matrix, monkeypatch, "--torch", "torch==9.8.7", "--tests", "test_good.py") == 0
    assert run(matrix, monkeypatch, "--torch", "torch==9.8.7", "--tests", "test_good.py", "test_bad.py") == 1
    closing = capsys.readouterr().out.split("\n\n")[-1]
    assert "9.8.7" in closing
    assert "1 passed" in closing
    assert "1 failed, 1 passed" in closing
    assert "torch==9.8.7: FAILED test_bad.py::test_bad" in closing


def test_a_release_that_does_not_install_is_a_fault(
    matrix: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def environment(asked: str) -> Path:
        raise LookupError(f"pip finds no {asked}")

    monkeypatch.setattr(matrix, "environment", environment)
    assert run(matrix, monkeypatch, "--torch", "torch==0.0", "--tests", "test_good.py") == 1
    assert "torch==0.0: pip finds no torch==0.0" in capsys.readouterr().out


def test_the_newest_release_is_the_first_that_pip_lists(
    matrix: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = "torch (9.8.7)\nAvailable versions: 9.8.7, 9.8.6\n  INSTALLED: 9.8.6\n"
    monkeypatch.setattr(matrix, "call", lambda command: listed)
    assert matrix.newest() == "torch==9.8.7"


def test_test_dependencies_exclude_torch(matrix: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    declared = ["torch>=2.11", "numpy", 'pytest>=8; extra == "test"', 'ruff==0.17.*; extra == "lint"']
    monkeypatch.setattr(matrix.metadata, "requires", lambda name: declared)
    assert matrix.requirements() == ["numpy", "pytest>=8"]

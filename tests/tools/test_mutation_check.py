# SPDX-License-Identifier: Apache-2.0
"""The mutation check: every fault applies; a fault that no test catches, that does not apply or that breaks
the build fails the run."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
from tool_loading import load


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(monkeypatch, "tools/mutation_check.py")


def test_every_fault_has_its_text_and_its_tests(check: ModuleType) -> None:
    assert len(check.MUTATIONS) >= 12
    assert not [reason for m in check.MUTATIONS if (reason := check.unplaced(m, check.ROOT))]
    names = [m.name for m in check.MUTATIONS]
    assert len(set(names)) == len(names)
    assert {m.selection for m in check.MUTATIONS} == set(check.SELECTIONS)
    for mutation in check.MUTATIONS:
        assert mutation.find != mutation.replace
    for selection in check.SELECTIONS.values():
        for word in (word for command in selection.commands for word in command):
            if word.startswith("tests/"):
                assert (check.ROOT / word).exists(), word


@pytest.mark.parametrize("quick", [False, True])
def test_faults_cover_all_parts_of_the_code(check: ModuleType, quick: bool) -> None:
    assert set(check.QUICK) <= {m.name for m in check.MUTATIONS}
    files = [m.file for m in check.MUTATIONS if m.name in check.QUICK or not quick]
    for folder in (
        "csrc/cpu/",
        "csrc/core/",
        "csrc/cuda/bodies/",
        "adacache_kernels/triton/",
        "adacache_kernels/_checks.py",
        "python/adacache/",
    ):
        assert any(file.startswith(folder) for file in files), folder


@pytest.fixture
def small_tree(check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A project with one function and one test."""
    root = tmp_path / "root"
    for name in ("tests", "adacache_kernels"):
        (root / name).mkdir(parents=True)
    (root / "tests" / "double.py").write_text("def double(x):\n    return 2 * x\n")
    test = "from double import double\n\ndef test_double():\n    assert double(2) == 4\n"
    (root / "tests" / "test_double.py").write_text(test)
    monkeypatch.setattr(check, "ROOT", root)
    monkeypatch.setattr(check, "WORK", tmp_path / "work")
    monkeypatch.setattr(sys.modules["built_copy"], "COPIED", ("tests", "adacache_kernels"))
    command = ["python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_double.py"]
    monkeypatch.setattr(check, "SELECTIONS", {"double": check.Selection([command])})
    monkeypatch.setattr(sys, "argv", ["mutation_check.py"])
    return root


def run(check: ModuleType, monkeypatch: pytest.MonkeyPatch, find: str, replace: str) -> int:
    mutation = check.Mutation("a fault", "tests/double.py", find, replace, "double")
    monkeypatch.setattr(check, "MUTATIONS", [mutation])
    return check.main()  # type: ignore[no-any-return]


def test_a_caught_fault_passes(
    check: ModuleType, small_tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(check, monkeypatch, "2 * x", "3 * x") == 0
    printed = capsys.readouterr().out
    assert "1 of 1 faults caught" in printed
    assert "test_double.py::test_double" in printed
    assert "2 * x" in (small_tree / "tests" / "double.py").read_text()


@pytest.mark.parametrize(
    ("find", "replace", "reason"),
    [
        ("2 * x", "x * 2", "0 of 1 faults caught"),
        ("4 * x", "2 * x", "its text occurs 0 times in tests/double.py, expected 1"),
        ("def double", "raise KeyError\ndef double", "is not a failed test"),
    ],
    ids=["missed", "lost", "broken"],
)
def test_uncaught_faults_fail_the_run(
    check: ModuleType,
    small_tree: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    find: str,
    replace: str,
    reason: str,
) -> None:
    assert run(check, monkeypatch, find, replace) == 1
    assert reason in capsys.readouterr().out


def test_selection_that_fails_without_a_fault_is_an_error(
    check: ModuleType, small_tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (small_tree / "tests" / "double.py").write_text("def double(x):\n    return 2 * x + 1\n")
    assert run(check, monkeypatch, "2 * x", "3 * x") == 1
    assert "selection double fails without a fault" in capsys.readouterr().out


def test_copy_is_updated(check: ModuleType, small_tree: Path, tmp_path: Path) -> None:
    tree = tmp_path / "copy"
    check.copy_sources(small_tree, tree)
    kept = tree / "tests" / "test_double.py"
    before = kept.stat().st_mtime_ns
    (tree / "tests" / "double.py").write_text("a fault of an interrupted run")
    (tree / "tests" / "gone.py").touch()
    check.copy_sources(small_tree, tree)
    assert "2 * x" in (tree / "tests" / "double.py").read_text()
    assert kept.stat().st_mtime_ns == before  # no recompilation
    assert not (tree / "tests" / "gone.py").exists()

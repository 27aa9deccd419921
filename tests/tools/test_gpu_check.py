# SPDX-License-Identifier: Apache-2.0
"""The GPU check without a GPU: stages, limits, results and goals."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from tool_loading import load


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    module = load(monkeypatch, "tools/gpu_check.py")
    monkeypatch.setattr(module, "WORK", tmp_path / "work")
    return module


def script(check: ModuleType, name: str, code: str):  # type: ignore[no-untyped-def]
    return check.Command(name, [sys.executable, "-c", code])


def test_later_commands_run_after_a_failure(gpu_check: ModuleType) -> None:
    commands = [
        script(gpu_check, "bad", "print('1 failed in 0.1s'); exit(3)"),
        script(gpu_check, "good", "print(5)"),
    ]
    for parallel in (False, True):
        result = gpu_check.run_stage(gpu_check.Stage("both", 60, commands, parallel))
        assert not result["passed"]
        assert [(c["command"], c["status"]) for c in result["commands"]] == [("bad", 3), ("good", 0)]
        assert result["commands"][0]["summary"] == "1 failed in 0.1s"


@pytest.mark.parametrize("parallel", [False, True])
def test_timeout_ends_the_process_and_its_children(gpu_check: ModuleType, parallel: bool) -> None:
    marker = gpu_check.WORK / "grandchild"
    child = f"import time; time.sleep(3); open({str(marker)!r}, 'w')"
    slow = (
        f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    )
    started = time.monotonic()
    commands = [script(gpu_check, "slow", slow)]
    result = gpu_check.run_stage(gpu_check.Stage("slow", 1, commands, parallel))
    assert time.monotonic() - started < 20
    assert not result["passed"]
    assert result["commands"][0]["status"] is None
    time.sleep(3)
    assert not marker.exists()


def test_a_missing_program_is_a_failure(gpu_check: ModuleType) -> None:
    stage = gpu_check.Stage("none", 60, [gpu_check.Command("none", ["/no/such/program"])])
    result = gpu_check.run_stage(stage)
    assert result["commands"][0]["status"] == 127
    assert "No such file" in result["commands"][0]["summary"]


@pytest.mark.parametrize(
    ("log", "summary"),
    [
        ("..\n==== 3 passed, 1 skipped in 2.10s ====\n", "3 passed, 1 skipped in 2.10s"),
        ("12 runs\n========= ERROR SUMMARY: 2 errors\n", "ERROR SUMMARY: 2 errors"),
        ("Traceback\nKeyError: 'x'\n\n", "KeyError: 'x'"),
        ("", "no output"),
    ],
)
def test_summary_line(gpu_check: ModuleType, log: str, summary: str) -> None:
    assert gpu_check.summary_of(log) == summary


def test_plan_covers_only_this_device_and_fits_three_calls_of_ten_minutes(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    stages = {stage.name: stage for stage in gpu_check.plan("9.0")}
    assert list(stages) == ["build", "tests", "sanitizer", "benchmarks"]
    assert stages["build"].limit <= 240
    assert stages["build"].commands[0].environment["TORCH_CUDA_ARCH_LIST"] == "9.0"
    assert all(stage.limit < 600 for stage in stages.values())
    assert stages["build"].limit + stages["tests"].limit < 600
    assert stages["sanitizer"].limit + stages["benchmarks"].limit < 600
    tools = {command.name for command in stages["sanitizer"].commands}
    assert {f"{tool}-cuda" for tool in ("memcheck", "racecheck", "initcheck")} <= tools
    names = [command.name for stage in stages.values() for command in stage.commands]
    assert len(set(names)) == len(names)  # names of the log files
    for stage in stages.values():
        for command in stage.commands:
            for word in command.arguments:
                if word.startswith(("tests/", "benchmarks/", "tools/")):
                    assert (gpu_check.ROOT / word).exists(), word
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert gpu_check.plan("9.0")[0].commands[0].environment["TORCH_CUDA_ARCH_LIST"] == "8.0"


def test_results_of_another_call_are_kept(gpu_check: ModuleType) -> None:
    earlier = {"date": "then", "build": {"torch": "2"}, "stages": {"build": {"passed": True}}, "goals": [1]}
    both = gpu_check.merged(earlier, {"date": "now", "commit": "c"})
    assert both["date"] == "now"
    assert both["stages"] == {"build": {"passed": True}}
    assert both["build"] == {"torch": "2"}
    assert both["benchmarks"] == {}


@pytest.mark.parametrize(("seconds", "status", "reached"), [(100, 0, True), (100, 1, False), (241, 0, False)])
def test_time_of_the_build_is_a_goal(
    gpu_check: ModuleType, seconds: float, status: int, reached: bool
) -> None:
    command = {"command": "build", "status": status, "seconds": seconds, "summary": ""}
    measured = {"goals": [{"case": "meter", "reached": False}]}
    goals = gpu_check.all_goals(
        {"stages": {"build": {"commands": [command]}}, "benchmarks": {"kernels": measured, "other": None}}
    )
    assert goals[0]["reached"] == reached
    assert goals[1:] == measured["goals"]


def test_dry_run_prints_and_runs_nothing(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--dry-run", "--stages", "build,benchmarks"])
    assert gpu_check.main() == 0
    printed = capsys.readouterr().out
    assert "build_ext" in printed
    assert "benchmarks/kernels.py" in printed
    assert "tests/ops" not in printed
    assert not gpu_check.WORK.exists()


@pytest.mark.parametrize(("package", "module"), [("pillow", "PIL"), ("matplotlib", "matplotlib")])
def test_dry_run_names_imports_of_packages_that_are_not_listed(
    gpu_check: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    package: str,
    module: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--dry-run"])
    assert gpu_check.main() == 0
    monkeypatch.delitem(gpu_check.NEEDED, package)
    if package == "pillow":  # required by matplotlib
        monkeypatch.delitem(gpu_check.NEEDED, "matplotlib")
    assert gpu_check.main() == 1
    assert f"NOT IN NEEDED: {module}, imported by " in capsys.readouterr().out


def test_program_on_path_replaces_a_package(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def not_installed(package: str) -> str:
        raise gpu_check.importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(gpu_check.importlib.metadata, "version", not_installed)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_check.version_of("cmake") is None
    for name in ("cmake", "pytest"):
        program = tmp_path / name
        program.write_text("#!/bin/sh\necho cmake version 3.31.6\n")
        program.chmod(0o755)
    assert gpu_check.version_of("cmake") == "3.31.6"
    assert gpu_check.version_of("pytest") is None
    assert "cmake is not installed" not in gpu_check.missing_here()


def test_stages_that_do_not_exist_are_named(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--stages", "build,bench"])
    with pytest.raises(SystemExit):
        gpu_check.main()
    assert "expected stages from build,tests,sanitizer,benchmarks, got bench" in capsys.readouterr().err


def test_results_are_written_after_each_stage(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    facts = {"device": {"name": "NVIDIA Test 80GB", "capability": "9.0"}}
    stages = [
        gpu_check.Stage("build", 60, [script(gpu_check, "build", "pass")]),
        gpu_check.Stage("benchmarks", 60, [script(gpu_check, "kernels", "exit(1)")]),
    ]
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(gpu_check, "device_facts", lambda: dict(facts))
    monkeypatch.setattr(gpu_check, "missing_here", list)
    monkeypatch.setattr(gpu_check, "plan", lambda capability: stages)
    also = tmp_path / "also"
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--commit", "0123456789abcdef", "--also-to", str(also)])
    assert gpu_check.main() == 1
    path = tmp_path / "results" / "nvidia-test-80gb-0123456789ab.json"
    results = json.loads(path.read_text())
    assert results["stages"]["build"]["passed"]
    assert not results["stages"]["benchmarks"]["passed"]
    assert [goal["case"] for goal in results["goals"]] == ["build for this device"]
    assert (also / path.name).read_text() == path.read_text()
    assert (also / "kernels.log").exists()
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--commit", "0123456789abcdef", "--stages", "build"])
    assert gpu_check.main() == 1  # the results contain the failure of the other call


def test_only_modules_that_a_script_imports_are_checked(gpu_check: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("import first, json\n")
    (tmp_path / "first.py").write_text("def f():\n    import second\n")
    (tmp_path / "second.py").write_text("import script\n")
    (tmp_path / "other.py").write_text("import torchmetrics\n")
    found = gpu_check.scripts_of(tmp_path / "script.py")
    assert [path.name for path in found] == ["first.py", "script.py", "second.py"]

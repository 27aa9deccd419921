# SPDX-License-Identifier: Apache-2.0
"""The header check: sources compile against the torch of the build and against an older torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tool_loading import load


@pytest.mark.parametrize("missing", [False, True], ids=["same_macros", "missing_macro"])
def test_macro_missing_in_another_torch_is_a_fault(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: bool
) -> None:
    compiler = shutil.which("c++") or pytest.skip("no C++ compiler")
    check = load(monkeypatch, "tools/abi_check.py")
    source = tmp_path / "csrc" / "torch" / "register.cpp"
    build = tmp_path / "build" / "cmake-here"
    for folder in (source.parent, build):
        folder.mkdir(parents=True)
    source.write_text("#include <macros.h>\nint main() { return CHECKED(0); }\n")
    for torch in ("new", "old"):
        (tmp_path / torch / "include").mkdir(parents=True)
        name = "OTHER" if missing and torch == "old" else "CHECKED"
        (tmp_path / torch / "include" / "macros.h").write_text(f"#define {name}(x) x\n")
    command = f"{compiler} -isystem {tmp_path}/new/include -o register.o -c {source}"
    entry = {"file": str(source), "directory": str(build), "command": command}
    (build / "compile_commands.json").write_text(json.dumps([entry]))
    monkeypatch.setattr(check, "ROOT", tmp_path)
    assert check.header_faults(tmp_path / "new", tmp_path / "new") == []
    faults = check.header_faults(tmp_path / "old", tmp_path / "new")
    assert len(faults) == missing
    assert all("register.cpp" in fault and "CHECKED" in fault for fault in faults)
    assert not (build / "register.o").exists()


def test_a_source_that_was_not_built_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check = load(monkeypatch, "tools/abi_check.py")
    for folder in ("csrc/torch", "build/cmake-here"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "csrc/torch/register_cuda.cpp").touch()
    (tmp_path / "build/cmake-here/compile_commands.json").write_text("[]")
    monkeypatch.setattr(check, "ROOT", tmp_path)
    assert check.header_faults(tmp_path, tmp_path) == []
    assert "NOT CHECKED" in capsys.readouterr().out

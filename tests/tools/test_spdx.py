# SPDX-License-Identifier: Apache-2.0
"""Every source file names its licence."""

from __future__ import annotations

from pathlib import Path

import pytest
from tool_loading import ROOT, load


def test_every_source_has_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    spdx = load(monkeypatch, "tools/spdx.py")
    names = {path.relative_to(ROOT).as_posix() for path in spdx.sources()}
    assert {"setup.py", ".ci/run", "csrc/core/decide.h", "adacache_kernels/_engine.pyi"} <= names
    missing = [p.name for p in spdx.sources() if spdx.line_of(p) not in p.read_text().splitlines()[:2]]
    assert missing == [], "run python tools/spdx.py --fix"


def test_the_line_is_added_after_the_interpreter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spdx = load(monkeypatch, "tools/spdx.py")
    monkeypatch.setattr(spdx, "ROOT", tmp_path)
    for name, before, after in [
        ("a.py", '"""Doc."""\nx = 1\n', f'# {spdx.LICENCE}\n"""Doc."""\nx = 1\n'),
        ("b.sh", "#!/bin/sh\ntrue\n", f"#!/bin/sh\n# {spdx.LICENCE}\ntrue\n"),
        ("c.cuh", "#pragma once\n", f"// {spdx.LICENCE}\n#pragma once\n"),
    ]:
        (tmp_path / name).write_text(before)
        spdx.add(tmp_path / name)
        assert (tmp_path / name).read_text() == after
    assert spdx.comment(tmp_path / "weights.safetensors") == ""

# SPDX-License-Identifier: Apache-2.0
"""docs/models.md lists all declared models; docs/models_tests.md is up to date."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import adacache
import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_list_of_tests_is_current() -> None:
    pytest.importorskip("diffusers")
    spec = importlib.util.spec_from_file_location("models_tests", ROOT / "tools" / "models_tests.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    expected = tool.text()
    assert "WanTransformer3DModel" in expected
    assert tool.FILE.read_text() == expected, "run python tools/models_tests.py"


def test_table_of_models_is_complete() -> None:
    lines = (ROOT / "docs" / "models.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("|")]
    for names in adacache.known_models():
        for name in names.split(" | "):
            assert any(f"`{name}`" in row for row in rows), f"{name} has no row in docs/models.md"

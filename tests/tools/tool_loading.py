# SPDX-License-Identifier: Apache-2.0
"""Imports scripts that are not part of a package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load(monkeypatch: pytest.MonkeyPatch, path: str) -> ModuleType:
    """The script at `path`, relative to the repository root, as a module."""
    name = "loaded_" + Path(path).stem
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # required by dataclasses
    monkeypatch.syspath_prepend(str((ROOT / path).parent))  # for modules in the same folder
    spec.loader.exec_module(module)
    return module

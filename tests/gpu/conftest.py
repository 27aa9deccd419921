# SPDX-License-Identifier: Apache-2.0
"""The tests in this folder reuse the ops, inputs and expected outputs of benchmarks/cases.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from op_threads import one_thread

__all__ = ["one_thread"]

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "layer"))
# Only during the import: diffusers imports a package `kernels` and would find benchmarks/kernels.py.
sys.path.insert(0, str(ROOT / "benchmarks"))
import check  # noqa: E402, F401  (also makes `cases` importable)

sys.path.remove(str(ROOT / "benchmarks"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))

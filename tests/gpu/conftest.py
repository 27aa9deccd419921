"""The benchmarks' list of ops serves these tests too: every op, each with inputs and what they must give."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from op_threads import one_thread

__all__ = ["one_thread"]

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "layer"))
# Not for longer than the import: diffusers looks for a package `kernels`, and would find the benchmark.
sys.path.insert(0, str(ROOT / "benchmarks"))
import check  # noqa: E402, F401  (and with it `cases`, for the tests here)

sys.path.remove(str(ROOT / "benchmarks"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))

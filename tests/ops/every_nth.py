"""A pytest plugin (-p every_nth): of each test function of this folder, the first of every
ADACACHE_TEST_EVERY cases."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    step = int(os.environ.get("ADACACHE_TEST_EVERY", "1"))
    met: Counter[str] = Counter()
    kept, left_out = [], []
    for item in items:
        function = item.nodeid.partition("[")[0]
        (left_out if item.path.parent == FOLDER and met[function] % step else kept).append(item)
        met[function] += 1
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)

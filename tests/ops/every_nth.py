# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin (-p every_nth) that selects every ADACACHE_TEST_EVERY-th case of each test function in this
folder."""

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

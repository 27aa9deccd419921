# SPDX-License-Identifier: Apache-2.0
"""Fixtures shared by several folders."""

from __future__ import annotations

import math
import os
import zlib
from typing import Any

import pytest


@pytest.fixture(scope="module")
def tiny_digit_model() -> Any:
    """A small random network with the inputs of the digit model."""
    from tiny_digits import network

    return network()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out cases of tests marked with `sampled`. ADACACHE_ALL_CASES=1 runs all."""
    if os.environ.get("ADACACHE_ALL_CASES"):
        return
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("sampled"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    left_out = {item for those in cases.values() for item in _left_out(those)}
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=list(left_out))


def _left_out(cases: list[pytest.Item]) -> list[pytest.Item]:
    """The cases of one test that are not in the sample: a fixed choice by their names, independent of other
    tests, so that every model and dtype occurs in some tests."""
    marker = cases[0].get_closest_marker("sampled")
    assert marker is not None
    ordered = sorted(cases, key=lambda item: zlib.crc32(item.nodeid.encode()))
    return ordered[math.ceil(len(cases) / marker.args[0]) :]

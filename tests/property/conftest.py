# SPDX-License-Identifier: Apache-2.0
"""Number of random cases per op: ADACACHE_PROPERTY, default 40."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings
from op_backends import backend, device, op_namespace, pytest_generate_tests
from op_threads import one_thread

__all__ = ["backend", "device", "one_thread", "op_namespace", "pytest_generate_tests"]

settings.register_profile(
    "adacache",
    max_examples=int(os.environ.get("ADACACHE_PROPERTY") or 40),
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    print_blob=False,
)
settings.load_profile("adacache")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/property" in item.path.as_posix():
            item.add_marker(pytest.mark.property)

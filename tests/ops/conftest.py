# SPDX-License-Identifier: Apache-2.0
"""Marks the tests of this folder with `ops` and runs them on the backends of this machine."""

from __future__ import annotations

import pytest
from op_backends import backend, device, op_namespace, pytest_generate_tests

__all__ = ["backend", "device", "op_namespace", "pytest_generate_tests"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/ops" in item.path.as_posix():
            item.add_marker(pytest.mark.ops)

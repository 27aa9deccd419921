# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the model tests."""

from __future__ import annotations

import pytest
from model_cases import ids
from op_threads import one_thread

__all__ = ["one_thread"]


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrizes `case` with CHECKED of the module, after the other parameters."""
    if "case" in metafunc.fixturenames and hasattr(metafunc.module, "CHECKED"):
        metafunc.parametrize("case", metafunc.module.CHECKED, ids=ids)

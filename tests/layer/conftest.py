# SPDX-License-Identifier: Apache-2.0
"""Fixtures of tests/layer."""

from __future__ import annotations

from collections.abc import Iterator

import adacache
import pytest
from adacache.models.stdit3 import STDiT3
from models import golden_model
from op_threads import one_thread

__all__ = ["one_thread"]


@pytest.fixture(scope="session")
def shared_model() -> STDiT3:
    return golden_model()


@pytest.fixture
def model(shared_model: STDiT3) -> Iterator[STDiT3]:
    """The recorded network; AdaCache is disabled after each test."""
    yield shared_model
    if any(name.startswith("_adacache") for name in shared_model.__dict__):
        adacache.disable(shared_model)

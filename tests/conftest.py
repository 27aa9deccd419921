# SPDX-License-Identifier: Apache-2.0
"""Fixtures shared by several folders."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="module")
def tiny_digit_model() -> Any:
    """A small random network with the inputs of the digit model."""
    from tiny_digits import network

    return network()

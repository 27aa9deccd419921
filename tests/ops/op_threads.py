# SPDX-License-Identifier: Apache-2.0
"""A fixture that limits torch to one thread. A conftest.py that imports `one_thread` applies it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """For small tensors a second thread only adds overhead."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

"""Fixtures of the tests on other models."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from model_cases import ids


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests that take a `case` run on all that their module names, after their other parameters."""
    if "case" in metafunc.fixturenames and hasattr(metafunc.module, "CHECKED"):
        metafunc.parametrize("case", metafunc.module.CHECKED, ids=ids)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small only lose time to a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

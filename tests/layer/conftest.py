"""Fixtures of the layer's tests."""

from __future__ import annotations

from collections.abc import Iterator

import adacache
import pytest
import torch
from adacache.models.stdit3 import STDiT3
from models import golden_model


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small only lose time to a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def shared_model() -> STDiT3:
    return golden_model()


@pytest.fixture
def model(shared_model: STDiT3) -> Iterator[STDiT3]:
    """The recorded network, given back without AdaCache whatever a test did."""
    yield shared_model
    if "forward" in shared_model.__dict__:
        adacache.disable(shared_model)

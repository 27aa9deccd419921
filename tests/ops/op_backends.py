# SPDX-License-Identifier: Apache-2.0
"""Fixtures for the backends of the op tests: those of this machine, or those listed in ADACACHE_TEST_BACKEND
(comma-separated). Imported by conftest files."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator

import pytest
import torch

import adacache_kernels
from adacache_kernels import _backend

ASKED = [name for name in os.environ.get("ADACACHE_TEST_BACKEND", "").split(",") if name]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        here = ["cpu", "reference"] + (["cuda", "triton"] if torch.cuda.is_available() else [])
        backends = ASKED or here
        if "op_namespace" in metafunc.fixturenames:  # the reference registers no ops
            backends = [name for name in backends if name != "reference"]
        metafunc.parametrize("backend", backends, indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Forces the backend for the test."""
    name: str = request.param
    missing = _backend._missing(name)
    if missing and name not in ASKED:
        pytest.skip(f"backend {name}: {missing}")
    with adacache_kernels.use_backend(name):
        yield name


@pytest.fixture
def device(backend: str) -> torch.device:
    """The device of the tensors for this backend."""
    on_gpu = backend == "cuda" or (backend == "triton" and not _backend._INTERPRETED)
    if backend == "reference" and torch.cuda.is_available():
        on_gpu = True
    return torch.device("cuda" if on_gpu else "cpu")


@pytest.fixture
def op_namespace(backend: str) -> str:
    """The torch.ops namespace of this backend."""
    if backend == "triton":
        importlib.import_module("adacache_kernels.triton")
        return "adacache_triton"
    return "adacache"

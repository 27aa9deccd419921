"""Figures of generated code (registers, spills, shared memory, instructions): asserted for the compiler
releases that they were measured with, warnings for every other one."""

from __future__ import annotations

import warnings
from importlib import metadata

import pytest

#: Releases of Triton, which brings its own ptxas.
MEASURED = ("3.8",)


def expect_of_compiler(met: bool, message: str) -> None:
    """Fail under a measured release, else warn, if a figure is not met. Results must not depend on it."""
    if met:
        return
    release = metadata.version("triton")
    if ".".join(release.split(".")[:2]) in MEASURED:
        pytest.fail(message)
    warnings.warn(f"Triton {release}, not measured before: {message}", stacklevel=2)

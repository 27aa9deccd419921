# SPDX-License-Identifier: Apache-2.0
"""Limits on generated code (registers, spills, shared memory, instructions): assertions for the compiler
releases with which they were measured, warnings for others."""

from __future__ import annotations

import warnings
from importlib import metadata

import pytest

#: Releases of Triton, which includes ptxas.
MEASURED = ("3.8",)


def expect_of_compiler(met: bool, message: str) -> None:
    """If `met` is false, fails under a measured release, otherwise warns."""
    if met:
        return
    release = metadata.version("triton")
    if ".".join(release.split(".")[:2]) in MEASURED:
        pytest.fail(message)
    warnings.warn(f"Triton {release} (limits not measured): {message}", stacklevel=2)

# SPDX-License-Identifier: Apache-2.0
"""gated_residual: bit-identical to NumPy over shapes, gates, layouts, row indices and unusual values."""

from __future__ import annotations

import pytest
import torch
from judge import JUDGES, MODULATORS, VALUES, Case
from op_cases import DTYPES, EMPTY_SHAPES, READ_LAYOUTS, SHAPES, Shape

judge = JUDGES["gated_residual"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES + EMPTY_SHAPES, ids=str)
def test_shapes(backend: str, device: torch.device, shape: Shape, dtype: torch.dtype) -> None:
    judge(Case(shape, dtype, gate="row"), device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", [*MODULATORS, None])
@pytest.mark.parametrize("shape", [Shape(2, 4, 9, 37), Shape(2, 3, 1, 16), Shape(2, 1, 6, 16)], ids=str)
def test_gates(
    backend: str, device: torch.device, dtype: torch.dtype, gate: str | None, shape: Shape
) -> None:
    judge(Case(shape, dtype, gate=gate, seed=1), device)


@pytest.mark.parametrize("layout", READ_LAYOUTS)
@pytest.mark.parametrize("out", ["fresh", "given", "x"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(backend: str, device: torch.device, layout: str, out: str, dtype: torch.dtype) -> None:
    judge(Case(dtype=dtype, layouts=(layout,), out=out, seed=2), device)


@pytest.mark.parametrize("total", [1, 2, 5])
@pytest.mark.parametrize("out", ["fresh", "given"])
def test_indexed_rows(backend: str, device: torch.device, total: int, out: str) -> None:
    for dtype in DTYPES:
        judge(Case(dtype=dtype, x_total=total, out=out, layouts=("unaligned", "contiguous"), seed=3), device)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_unusual_values(backend: str, device: torch.device, values: str, dtype: torch.dtype) -> None:
    judge(Case(dtype=dtype, values=values, seed=4), device)

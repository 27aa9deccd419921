# SPDX-License-Identifier: Apache-2.0
"""reuse_residual: bit-identical for every pair of dtypes and float8, rows that reuse, layouts, row indices
and unusual values."""

from __future__ import annotations

import pytest
import torch
from judge import FLOAT8, JUDGES, VALUES, Case
from op_cases import DTYPES, EMPTY_SHAPES, READ_LAYOUTS, SHAPES, Shape, same_bits

from adacache_kernels import reuse_residual

judge = JUDGES["reuse_residual"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kept", [*DTYPES, FLOAT8])
@pytest.mark.parametrize("shape", SHAPES + EMPTY_SHAPES, ids=str)
def test_shapes(
    backend: str, device: torch.device, shape: Shape, dtype: torch.dtype, kept: torch.dtype
) -> None:
    judge(Case(shape, dtype, kept=kept), device)


@pytest.mark.parametrize("out", ["fresh", "given", "x"])
@pytest.mark.parametrize(
    ("videos", "reuse"),
    [
        (None, (True,)),
        (None, (False,)),
        (None, (True, False, True, False)),
        ((0, 1, 0, 1), (False, True)),
        ((2, 0, 2, 2), (True, True, False)),
        ((1, 1, 0, 0), None),
    ],
    ids=str,
)
def test_which_rows_reuse(
    backend: str, device: torch.device, videos: tuple[int, ...], reuse: tuple[bool, ...], out: str
) -> None:
    for dtype, kept in (
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, FLOAT8),
    ):
        judge(Case(Shape(4, 2, 5, 33), dtype, kept=kept, videos=videos, reuse=reuse, out=out, seed=1), device)


@pytest.mark.parametrize("layout", READ_LAYOUTS)
@pytest.mark.parametrize("out", ["fresh", "given", "x"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(backend: str, device: torch.device, layout: str, out: str, dtype: torch.dtype) -> None:
    for kept in (None, FLOAT8):
        judge(Case(dtype=dtype, layouts=(layout,), out=out, kept=kept, reuse=(True, False), seed=2), device)


@pytest.mark.parametrize("x_total", [None, 1, 5])
@pytest.mark.parametrize("kept_total", [None, 1, 5])
@pytest.mark.parametrize("kept", [None, FLOAT8])
def test_indexed_rows(
    backend: str,
    device: torch.device,
    x_total: int | None,
    kept_total: int | None,
    kept: torch.dtype | None,
) -> None:
    for reuse in (None, (False, True)):
        judge(Case(x_total=x_total, kept_total=kept_total, kept=kept, reuse=reuse, seed=3), device)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_unusual_values(backend: str, device: torch.device, values: str, dtype: torch.dtype) -> None:
    for kept in (*DTYPES, FLOAT8):
        judge(Case(dtype=dtype, values=values, kept=kept, reuse=(True, False), seed=4), device)


def test_nan_stays_in_rows_that_reuse(backend: str, device: torch.device) -> None:
    """Rows that do not reuse are copied: a NaN residual does not affect them, and -0 is preserved."""
    x = torch.randn(2, 3, 8, device=device)
    x[0, 0, 0] = -0.0
    residual = torch.full_like(x, torch.nan)
    x_out = reuse_residual(x, residual, reuse=torch.tensor([False, True], device=device))
    assert same_bits(x_out[0], x[0])
    assert x_out[1].isnan().all()

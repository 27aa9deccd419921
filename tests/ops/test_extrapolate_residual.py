# SPDX-License-Identifier: Apache-2.0
"""extrapolate_residual: bit-identical for every number of factors and pair of dtypes, coefficients per video,
layouts, row indices and unusual values."""

from __future__ import annotations

import pytest
import torch
from judge import JUDGES, VALUES, Case
from op_cases import DTYPES, EMPTY_SHAPES, READ_LAYOUTS, SHAPES, Shape, same_bits

from adacache_kernels import extrapolate_residual

judge = JUDGES["extrapolate_residual"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kept", DTYPES)
@pytest.mark.parametrize("factors", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", SHAPES[:3] + EMPTY_SHAPES, ids=str)
def test_shapes(
    backend: str,
    device: torch.device,
    shape: Shape,
    factors: int,
    dtype: torch.dtype,
    kept: torch.dtype,
) -> None:
    judge(Case(shape, dtype, kept=kept, factors=factors), device)


@pytest.mark.parametrize("shape", SHAPES[3:], ids=str)
def test_larger_shapes(backend: str, device: torch.device, shape: Shape) -> None:
    judge(Case(shape, factors=3), device)


@pytest.mark.parametrize("out", ["fresh", "given", "x"])
@pytest.mark.parametrize(
    ("videos", "num_videos"),
    [(None, 1), (None, 4), ((0, 1, 0, 1), 2), ((2, 0, 2, 2), 3), ((0, 0, 0, 0), 1)],
    ids=str,
)
def test_coefficients_by_video(
    backend: str, device: torch.device, videos: tuple[int, ...] | None, num_videos: int, out: str
) -> None:
    for dtype in DTYPES:
        judge(Case(Shape(4, 2, 5, 33), dtype, videos=videos, num_videos=num_videos, out=out, seed=1), device)


@pytest.mark.parametrize("layout", READ_LAYOUTS)
@pytest.mark.parametrize("out", ["fresh", "given", "x"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(backend: str, device: torch.device, layout: str, out: str, dtype: torch.dtype) -> None:
    judge(Case(dtype=dtype, layouts=(layout,), out=out, factors=3, seed=2), device)
    mixed = (layout, "contiguous", "unaligned", "rows_inside")
    judge(Case(dtype=dtype, layouts=mixed, out=out, factors=4, seed=2), device)


@pytest.mark.parametrize("x_total", [None, 1, 5])
@pytest.mark.parametrize("kept_total", [None, 1, 5])
def test_indexed_rows(
    backend: str, device: torch.device, x_total: int | None, kept_total: int | None
) -> None:
    for dtype in DTYPES:
        judge(Case(dtype=dtype, x_total=x_total, kept_total=kept_total, factors=3, seed=3), device)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_unusual_values(backend: str, device: torch.device, values: str, dtype: torch.dtype) -> None:
    for kept in DTYPES:
        judge(Case(dtype=dtype, values=values, kept=kept, factors=3, seed=4), device)


def test_forecasts_a_cubic_exactly(backend: str, device: torch.device) -> None:
    """A polynomial residual with its differences as factors (Newton's formula); integers are exact."""
    grid = torch.arange(5, dtype=torch.float32, device=device)

    def residual(step: torch.Tensor) -> torch.Tensor:
        return (step**3 - 2 * step**2 + 3 * step - 4)[:, None, None].expand(-1, 3, 7)

    known = residual(grid)
    differences = [known[3:4]]  # backward differences at step 3
    table = known[:4]
    for _ in range(3):
        table = table[1:] - table[:-1]
        differences.append(table[-1:])
    one_ahead = torch.ones(1, 4, device=device)
    x = torch.zeros(1, 3, 7, device=device)
    factors = [difference.contiguous() for difference in differences]
    assert same_bits(extrapolate_residual(x, factors, one_ahead), known[4:5].contiguous())

# SPDX-License-Identifier: Apache-2.0
"""The norm ops: error against float64 relative to that of eager PyTorch, over shapes, modulators, layouts,
row indices and unusual values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from judge import JUDGES, MODULATORS, VALUES, Case
from op_cases import DTYPES, EMPTY_SHAPES, READ_LAYOUTS, SHAPES, Shape

Judge = Callable[[Case, torch.device], None]


@pytest.fixture(params=["layer_norm_modulate", "rms_norm_modulate"])
def judge(request: pytest.FixtureRequest) -> Judge:
    return JUDGES[request.param]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES + EMPTY_SHAPES, ids=str)
@pytest.mark.parametrize("affine", [False, True])
def test_shapes(
    judge: Judge, backend: str, device: torch.device, shape: Shape, dtype: torch.dtype, affine: bool
) -> None:
    judge(Case(shape, dtype, scale="row", weight=affine, bias=affine), device)


@pytest.mark.parametrize("shift", [*MODULATORS, None])
@pytest.mark.parametrize("scale", [*MODULATORS, None])
@pytest.mark.parametrize("shape", [Shape(2, 4, 9, 37), Shape(2, 3, 1, 16), Shape(2, 1, 6, 16)], ids=str)
@pytest.mark.sampled(4)
def test_modulators(
    judge: Judge, backend: str, device: torch.device, shift: str | None, scale: str | None, shape: Shape
) -> None:
    for dtype in DTYPES:
        judge(Case(shape, dtype, shift=shift, scale=scale, weight=True, seed=1), device)


@pytest.mark.parametrize("layout", READ_LAYOUTS)
@pytest.mark.parametrize("out", ["fresh", "given", "x"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(
    judge: Judge, backend: str, device: torch.device, layout: str, out: str, dtype: torch.dtype
) -> None:
    judge(Case(dtype=dtype, layouts=(layout,), out=out, bias=True, seed=2), device)


@pytest.mark.parametrize("total", [1, 2, 5])
@pytest.mark.parametrize("out", ["fresh", "given"])
def test_indexed_rows(judge: Judge, backend: str, device: torch.device, total: int, out: str) -> None:
    for dtype in DTYPES:
        judge(Case(dtype=dtype, x_total=total, out=out, layouts=("unaligned", "contiguous"), seed=3), device)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eps", [1e-6, 1e-3])
def test_unusual_values(
    judge: Judge, backend: str, device: torch.device, values: str, dtype: torch.dtype, eps: float
) -> None:
    judge(Case(dtype=dtype, values=values, eps=eps, weight=True, bias=True, seed=4), device)


@pytest.mark.parametrize("channels", [1, 2, 3, 15, 16, 17, 31, 33, 255, 257, 1000, 3072, 4097])
def test_widths(judge: Judge, backend: str, device: torch.device, channels: int) -> None:
    for dtype in DTYPES:
        judge(Case(Shape(1, 1, 3, channels), dtype, scale="row", weight=True, bias=True, seed=5), device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_mean(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """The variance must be computed from differences to the mean: E[x^2] - E[x]^2 would cancel."""
    from judge import check_norm

    from adacache_kernels import layer_norm_modulate

    generator = torch.Generator().manual_seed(6)
    x = (100 + torch.randn(2, 15, 40, generator=generator)).to(dtype)
    y = layer_norm_modulate(x.to(device), None, None)
    check_norm(y, x, None, None, {"weight": None, "bias": None}, Case(dtype=dtype))

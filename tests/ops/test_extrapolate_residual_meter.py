# SPDX-License-Identifier: Apache-2.0
"""extrapolate_residual_meter: the stream is that of extrapolate_residual; sums against a second forecast and
against a computed residual, per video, for layouts, row indices and unusual values."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from judge import JUDGES, VALUES, Case
from op_cases import DTYPES, EMPTY_SHAPES, SHAPES, Shape, same_bits

from adacache_kernels import extrapolate_residual, extrapolate_residual_meter, residual_meter

judge = JUDGES["extrapolate_residual_meter"]


@pytest.mark.parametrize("compare", ["forecast", "computed"])
@pytest.mark.parametrize("shape", SHAPES + EMPTY_SHAPES, ids=str)
def test_shapes(backend: str, device: torch.device, shape: Shape, compare: str) -> None:
    for factors, (dtype, kept) in enumerate(zip(DTYPES, [*DTYPES[1:], DTYPES[0]], strict=True), 1):
        case = Case(shape, dtype, kept=kept, factors=factors, compare=compare, strides=(1, 2, 3))
        judge(dataclasses.replace(case, metric="l2" if factors == 2 else "l1"), device)


@pytest.mark.parametrize("out", ["fresh", "given", "x"])
@pytest.mark.parametrize(
    ("videos", "num_videos"), [(None, 1), ((0, 1, 0, 1), 2), ((2, 0, 2, 2), 3), ((0, 0, 0, 0), 1)], ids=str
)
def test_videos(
    backend: str, device: torch.device, videos: tuple[int, ...] | None, num_videos: int, out: str
) -> None:
    case = Case(Shape(4, 3, 5, 33), videos=videos, num_videos=num_videos, out=out, strides=(), seed=1)
    for compare in ("forecast", "computed"):
        judge(dataclasses.replace(case, compare=compare, metric="cosine"), device)


@pytest.mark.parametrize(
    "layout", ["channel_slice", "unaligned", "token_slice", "rows_inside", "shared_tokens"]
)
def test_layouts(backend: str, device: torch.device, layout: str) -> None:
    for dtype, compare in zip(DTYPES, ("forecast", "computed", "computed"), strict=True):
        mixed = (layout, "contiguous", "unaligned", "rows_inside")
        judge(
            Case(dtype=dtype, layouts=mixed, out="x", factors=4, compare=compare, strides=(2,), seed=2),
            device,
        )


@pytest.mark.parametrize("x_total", [None, 5])
@pytest.mark.parametrize("kept_total", [None, 5])
def test_indexed_rows(
    backend: str, device: torch.device, x_total: int | None, kept_total: int | None
) -> None:
    for compare in ("forecast", "computed"):
        case = Case(x_total=x_total, kept_total=kept_total, factors=3, compare=compare, strides=(1,), seed=3)
        judge(case, device)


@pytest.mark.parametrize("values", VALUES)
def test_unusual_values(backend: str, device: torch.device, values: str) -> None:
    for dtype, compare in zip(DTYPES, ("forecast", "computed", "forecast"), strict=True):
        judge(Case(dtype=dtype, values=values, compare=compare, metric="l2", seed=4), device)


def test_two_passes_give_the_same(backend: str, device: torch.device) -> None:
    """In float32, the result of extrapolate_residual, and of residual_meter on two forecasts."""
    generator = torch.Generator().manual_seed(5)
    x, *factors = torch.randn(4, 2, 12, 40, generator=generator).to(device).unbind(0)
    own, other = torch.randn(2, 1, 3, generator=generator).to(device).unbind(0)
    own, other = own.contiguous(), other.contiguous()
    x_out, sums = extrapolate_residual_meter(x, factors, own, other_coefficients=other, frames=4, metric="l2")
    assert same_bits(x_out, extrapolate_residual(x, factors, own))
    zero = torch.zeros_like(x)
    forecasts = [extrapolate_residual(zero, factors, by) for by in (own, other)]
    expected = residual_meter(*forecasts, frames=4, metric="l2")
    torch.testing.assert_close(sums, expected, rtol=1e-6, atol=0)
    again = extrapolate_residual_meter(x, factors, own, computed=forecasts[1], frames=4, metric="l2")
    torch.testing.assert_close(again[1], sums, rtol=1e-6, atol=0)
    equal = extrapolate_residual_meter(x, factors, own, other_coefficients=own.clone(), frames=4)[1]
    assert equal[0, 0] == 0
    assert equal[0, 1] == equal[0, 2] > 0

# SPDX-License-Identifier: Apache-2.0
"""gated_residual_norm: bit-identical x_out, the norm against float64 and layer_norm_modulate, over shapes,
modulators, layouts, row indices and unusual values."""

from __future__ import annotations

import pytest
import torch
from judge import JUDGES, MODULATORS, VALUES, Case
from op_calls import good_call
from op_cases import DTYPES, EMPTY_SHAPES, READ_LAYOUTS, SHAPES, Shape, same_bits

from adacache_kernels import gated_residual_norm, layer_norm_modulate

judge = JUDGES["gated_residual_norm"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES + EMPTY_SHAPES, ids=str)
@pytest.mark.parametrize("affine", [False, True])
def test_shapes(backend: str, device: torch.device, shape: Shape, dtype: torch.dtype, affine: bool) -> None:
    judge(Case(shape, dtype, gate="row", scale="row", weight=affine, bias=affine), device)


@pytest.mark.parametrize("gate", [*MODULATORS, None])
@pytest.mark.parametrize("modulated", [*MODULATORS, None])
@pytest.mark.parametrize("shape", [Shape(2, 4, 9, 37), Shape(2, 3, 1, 16), Shape(2, 1, 6, 16)], ids=str)
@pytest.mark.sampled(4)
def test_modulators(
    backend: str, device: torch.device, gate: str | None, modulated: str | None, shape: Shape
) -> None:
    for dtype in DTYPES:
        judge(Case(shape, dtype, gate=gate, shift=modulated, scale="token", seed=1), device)
        judge(Case(shape, dtype, gate=gate, shift="row", scale=modulated, weight=True, seed=2), device)


@pytest.mark.parametrize("layout", READ_LAYOUTS)
@pytest.mark.parametrize("out", ["fresh", "given", "x"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(backend: str, device: torch.device, layout: str, out: str, dtype: torch.dtype) -> None:
    judge(Case(dtype=dtype, layouts=(layout,), out=out, bias=True, seed=3), device)


@pytest.mark.parametrize("total", [1, 2, 5])
@pytest.mark.parametrize("out", ["fresh", "given"])
def test_indexed_rows(backend: str, device: torch.device, total: int, out: str) -> None:
    for dtype in DTYPES:
        judge(Case(dtype=dtype, x_total=total, out=out, layouts=("unaligned", "contiguous"), seed=4), device)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_unusual_values(backend: str, device: torch.device, values: str, dtype: torch.dtype) -> None:
    judge(Case(dtype=dtype, values=values, weight=True, bias=True, seed=5), device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [8, 37, 1152])
def test_norm_is_bit_identical_to_layer_norm_modulate(
    backend: str, device: torch.device, dtype: torch.dtype, channels: int
) -> None:
    if backend == "triton" and device.type == "cuda":
        pytest.skip("in Triton the order of sums may depend on strides")
    call = {
        name: value.to(dtype).repeat(*[1] * (value.dim() - 1), channels // 8 + 1)[..., :channels]
        for name, value in good_call("gated_residual_norm", device).items()
    }
    x_out, normed = gated_residual_norm(**call)
    names = ("shift", "scale", "weight", "bias")
    assert same_bits(normed, layer_norm_modulate(x_out, **{name: call[name] for name in names}))

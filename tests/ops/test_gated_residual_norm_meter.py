# SPDX-License-Identifier: Apache-2.0
"""gated_residual_norm_meter: the checks of gated_residual_meter and layer_norm_modulate, and bit-identical to
both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from judge import FLOAT8, JUDGES, MODULATORS, VALUES, Case
from op_calls import copied, good_call, run
from op_cases import DTYPES, EMPTY_SHAPES, READ_LAYOUTS, SHAPES, Shape, same_bits

judge = JUDGES["gated_residual_norm_meter"]


@pytest.mark.parametrize("kept", [None, FLOAT8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("metric", ["l1", "l2"])
def test_shapes(
    backend: str,
    device: torch.device,
    shape: Shape,
    dtype: torch.dtype,
    metric: str,
    kept: torch.dtype | None,
) -> None:
    judge(Case(shape, dtype, metric=metric, kept=kept, weight=metric == "l2", bias=kept is None), device)


@pytest.mark.parametrize("kept", [None, FLOAT8])
@pytest.mark.parametrize("shape", EMPTY_SHAPES, ids=str)
@pytest.mark.parametrize("out", ["fresh", "given", "x"])
def test_empty(backend: str, device: torch.device, shape: Shape, out: str, kept: torch.dtype | None) -> None:
    judge(Case(shape, out=out, kept=kept, gate="row", scale="row"), device)


@pytest.mark.parametrize("gate", [*MODULATORS, None])
@pytest.mark.parametrize("modulated", [*MODULATORS, None])
@pytest.mark.parametrize("shape", [Shape(2, 4, 9, 37), Shape(2, 3, 1, 16), Shape(2, 1, 6, 16)], ids=str)
@pytest.mark.sampled(4)
def test_modulators(
    backend: str, device: torch.device, gate: str | None, modulated: str | None, shape: Shape
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        judge(Case(shape, dtype, gate=gate, shift=modulated, scale="token", seed=1), device)
        judge(Case(shape, dtype, gate=gate, shift="row", scale=modulated, kept=FLOAT8, seed=2), device)


@pytest.mark.parametrize("strides", [(), (2,), (1, 2, 4), (1, 2, 3, 4, 1, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("kept", [None, FLOAT8])
def test_strides(
    backend: str, device: torch.device, strides: tuple[int, ...], kept: torch.dtype | None
) -> None:
    judge(Case(Shape(2, 5, 7, 24), strides=strides, metric="cosine", kept=kept, seed=3), device)


@pytest.mark.parametrize("layout", READ_LAYOUTS)
@pytest.mark.parametrize("out", ["fresh", "given", "x"])
@pytest.mark.parametrize("kept", [None, FLOAT8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.sampled(3)
def test_layouts(
    backend: str, device: torch.device, layout: str, out: str, kept: torch.dtype | None, dtype: torch.dtype
) -> None:
    judge(Case(dtype=dtype, layouts=(layout,), out=out, kept=kept, strides=(1, 2), seed=4), device)


@pytest.mark.parametrize("x_total", [None, 1, 5])
@pytest.mark.parametrize("kept_total", [None, 2, 5])
@pytest.mark.parametrize("kept", [None, FLOAT8])
def test_indexed_rows(
    backend: str,
    device: torch.device,
    x_total: int | None,
    kept_total: int | None,
    kept: torch.dtype | None,
) -> None:
    for dtype in DTYPES:
        judge(Case(dtype=dtype, x_total=x_total, kept_total=kept_total, kept=kept, seed=5), device)


def test_videos_of_uneven_size(backend: str, device: torch.device) -> None:
    judge(Case(Shape(4, 3, 5, 33), videos=(1, 3, 1, 1), num_videos=5, metric="cosine"), device)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kept", [None, FLOAT8])
def test_unusual_values(
    backend: str, device: torch.device, values: str, dtype: torch.dtype, kept: torch.dtype | None
) -> None:
    judge(Case(dtype=dtype, values=values, kept=kept, metric="l2", weight=True, seed=6), device)


@pytest.mark.parametrize("float8", [False, True])
@pytest.mark.parametrize("channels", [8, 37, 1152])
def test_bit_identical_to_the_separate_ops(
    backend: str, device: torch.device, channels: int, float8: bool
) -> None:
    if backend == "triton" and device.type == "cuda":
        pytest.skip("in Triton the order of sums may depend on strides")
    call: dict[str, Any] = good_call("gated_residual_norm_meter", device, float8=float8)
    for name, value in call.items():
        if isinstance(value, torch.Tensor) and name not in ("video_of_row", "residual_scale"):
            call[name] = value.repeat(*[1] * (value.dim() - 1), channels // 8 + 1)[
                ..., :channels
            ].contiguous()
    names = ("shift", "scale", "weight", "bias")
    apart = copied({name: value for name, value in call.items() if name not in names})
    x_out, normed, sums = run("gated_residual_norm_meter", call)
    x_out_apart, sums_apart = run("gated_residual_meter", apart)
    (normed_apart,) = run("layer_norm_modulate", {"x": x_out, **{name: call[name] for name in names}})
    assert same_bits(x_out, x_out_apart)
    assert same_bits(normed, normed_apart)
    assert same_bits(call["residual"], apart["residual"])
    torch.testing.assert_close(sums, sums_apart, rtol=1e-6, atol=1e-6)

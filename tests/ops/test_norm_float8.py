# SPDX-License-Identifier: Apache-2.0
"""The norms in float8: bit-identical to the quantized float32 norm, also for unusual tokens; against float64
over shapes, layouts and row indices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from judge import JUDGES, VALUES, Case
from op_calls import good_call, run
from op_cases import DTYPES, EMPTY_SHAPES, READ_LAYOUTS, SHAPES, Shape, random_tensor, same_bits

from adacache_kernels import gated_residual, norm_modulate_float8
from adacache_kernels.reference.tokens import quantized

OPS = ["norm_modulate_float8", "gated_residual_norm_float8"]
NORMS = ["layer", "rms"]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes(backend: str, device: torch.device, op: str, dtype: torch.dtype) -> None:
    for number, shape in enumerate(SHAPES + EMPTY_SHAPES):
        choice = {"norm": NORMS[number % 2], "weight": number % 3 > 0, "bias": number % 3 > 1}
        JUDGES[op](Case(shape, dtype, gate="row", scale="row", **choice), device)
    for channels in (15, 257, 4097):
        JUDGES[op](Case(Shape(1, 1, 3, channels), dtype, scale="row", weight=True, seed=1), device)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out", ["fresh", "given"])
def test_layouts_and_rows(backend: str, device: torch.device, op: str, dtype: torch.dtype, out: str) -> None:
    for layout in READ_LAYOUTS:
        JUDGES[op](Case(dtype=dtype, layouts=(layout,), out=out, bias=True, seed=2), device)
    for total in (1, 5):
        layouts = ("unaligned", "contiguous")
        JUDGES[op](Case(dtype=dtype, x_total=total, out=out, layouts=layouts, seed=3), device)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
def test_unusual_values(backend: str, device: torch.device, op: str, dtype: torch.dtype, norm: str) -> None:
    for values in VALUES:
        for shift in (None, "frame"):
            case = Case(dtype=dtype, values=values, norm=norm, shift=shift, scale="token", seed=4)
            JUDGES[op](case, device)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("channels", [1, 8, 37, 1152, 4097])
def test_bit_identical_to_the_quantized_norm(
    backend: str, device: torch.device, norm: str, channels: int
) -> None:
    """For x in float32, whose norm is not rounded. Tokens of zeros, tiny and not finite values included."""
    generator = torch.Generator().manual_seed(5)
    x, shift, scale = (
        random_tensor(generator, 2, tokens, channels, dtype=torch.float32, device=device)
        for tokens in (9, 9, 1)
    )
    x[0, :3] = 0
    for token, value in enumerate((0.0, 2.0**-101, 1e-35, torch.nan, torch.inf)):
        shift[0, token] = 0 if token < 3 else shift[0, token]
        shift[0, token, -1] = value
    shift[1, 0] = 1e38
    (normed,) = run(f"{norm}_norm_modulate", {"x": x, "shift": shift, "scale": scale})
    stored, scales = norm_modulate_float8(x, shift, scale, norm=norm)
    expected, expected_scales = quantized(normed)
    assert scales.shape == (2, 9, 1)
    nan = expected.float().isnan()
    assert torch.equal(stored.float().isnan(), nan)
    assert torch.equal(stored.float()[~nan], expected.float()[~nan])
    torch.testing.assert_close(scales[..., 0], expected_scales, rtol=0, atol=0, equal_nan=True)
    assert (scales[0, :3] == 1).all()
    assert scales[0, 3].isnan()
    assert scales[0, 4].isinf()
    assert stored.float()[0, 4, :-1].eq(0).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_not_rounded_to_the_dtype_of_x(
    backend: str, device: torch.device, dtype: torch.dtype, norm: str
) -> None:
    call: dict[str, Any] = {"norm": norm}
    for name, value in good_call("norm_modulate_float8", device).items():
        call[name] = value.to(dtype).repeat(*[1] * (value.dim() - 1), 5)
    wide = {name: value.float() if name != "norm" else value for name, value in call.items()}
    given, expected = norm_modulate_float8(**call), norm_modulate_float8(**wide)
    torch.testing.assert_close(given[1], expected[1], rtol=1e-6, atol=0)
    if backend in ("cpu", "reference"):  # otherwise the order of the sums depends on the dtype of x
        assert all(map(same_bits, given, expected))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [8, 37, 1152])
def test_fused_op_is_bit_identical_to_the_separate_ops(
    backend: str, device: torch.device, dtype: torch.dtype, norm: str, channels: int
) -> None:
    if backend == "triton" and device.type == "cuda":
        pytest.skip("in Triton the order of sums may depend on strides")
    call = {
        name: value.to(dtype).repeat(*[1] * (value.dim() - 1), channels // 8 + 1)[..., :channels]
        for name, value in good_call("gated_residual_norm_float8", device).items()
    }
    x_out, *normed = run("gated_residual_norm_float8", call | {"norm": norm})
    assert same_bits(x_out, gated_residual(call["x"], call["y"], call["gate"]))
    names = ("shift", "scale", "weight", "bias")
    expected = norm_modulate_float8(x_out, norm=norm, **{name: call[name] for name in names})
    assert all(map(same_bits, normed, expected))

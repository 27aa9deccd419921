# SPDX-License-Identifier: Apache-2.0
"""Modulators in float32 beside a 16-bit x, tables, rounding, and the kind of norm: against NumPy, and
bit-identical to what models compute in eager PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from judge import FLOAT8, JUDGES, MODULATORS, Case
from op_calls import copied, good_call, parameters, run
from op_cases import Shape, random_tensor, same_bits

from adacache_kernels import gated_residual, gated_residual_meter

OPS = [op for op in JUDGES if {"gate", "shift"} & set(parameters(op))]
GATED = [op for op in OPS if op.startswith("gated")]
METERS = [op for op in GATED if op.endswith("meter")]
HALVES = [torch.bfloat16, torch.float16]
ALL = ("gate", "shift", "scale", "weight", "bias")
SHAPES = [Shape(2, 3, 5, 40), Shape(2, 4, 3, 37), Shape(1, 2, 3, 1152)]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("wide", [*((name,) for name in ALL), ALL], ids="+".join)
@pytest.mark.sampled(4)
def test_float32_modulators(
    backend: str, device: torch.device, op: str, dtype: torch.dtype, shape: Shape, wide: tuple[str, ...]
) -> None:
    if set(wide) & set(parameters(op)):
        JUDGES[op](Case(shape, dtype, wide=wide, weight=True, bias=True, shift="token", seed=1), device)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("kind", MODULATORS)
@pytest.mark.sampled(4)
def test_granularity(backend: str, device: torch.device, op: str, dtype: torch.dtype, kind: str) -> None:
    for wide in ((), ALL):
        for rounding in ("eager", "float32"):
            case = Case(dtype=dtype, gate=kind, shift=kind, scale=kind, wide=wide, rounding=rounding, seed=2)
            JUDGES[op](case, device)
            tables = Case(**{**vars(case), "tables": ALL, "layouts": ("channel_slice", "unaligned")})
            JUDGES[op](tables, device)


@pytest.mark.parametrize("op", GATED)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("kept", [None, FLOAT8])
@pytest.mark.parametrize("values", ["normal", "tiny", "huge", "special"])
@pytest.mark.sampled(4)
def test_rounding(
    backend: str, device: torch.device, op: str, dtype: torch.dtype, kept: torch.dtype | None, values: str
) -> None:
    for gate in ("row", "frame", None):
        case = Case(dtype=dtype, gate=gate, kept=kept, values=values, wide=("gate",), rounding="float32")
        JUDGES[op](Case(**{**vars(case), "strides": (1, 2), "metric": "l2", "seed": 3}), device)


@pytest.mark.parametrize("op", [op for op in OPS if "norm" in op])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("shape", [*SHAPES, Shape(1, 2, 2, 5120)], ids=str)
def test_rms_norm(backend: str, device: torch.device, op: str, dtype: torch.dtype, shape: Shape) -> None:
    for weight, bias, shift in ((False, False, None), (True, False, None), (True, True, "frame")):
        case = Case(shape, dtype, norm="rms", weight=weight, bias=bias, shift=shift, kept=None, seed=4)
        JUDGES[op](case, device)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("groups", [1, 3, 15])
def test_bit_identical_to_the_blocks_of_wan(
    backend: str, device: torch.device, dtype: torch.dtype, groups: int
) -> None:
    """(scale_shift_table + temb.float()).chunk(6), then (x.float() + y * gate).type_as(x)."""
    generator = torch.Generator().manual_seed(5)
    x, y = (random_tensor(generator, 2, 15, 72, dtype=dtype, device=device) for _ in range(2))
    table = random_tensor(generator, 1, 6, 72, dtype=torch.float32, device=device)
    temb = random_tensor(generator, 2, groups, 6, 72, dtype=dtype, device=device)
    gate = (table.unsqueeze(1) + temb.float())[:, :, 2].repeat_interleave(15 // groups, 1)
    expected = (x.float() + y * gate).type_as(x)
    given = gated_residual(x, y, temb[:, :, 2], gate_table=table[:, 2:3], rounding="float32")
    assert torch.equal(given, expected)
    sums = (table[:, None] + temb.float())[:, :, 2]
    assert torch.equal(gated_residual(x, y, sums, rounding="float32"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_bit_identical_to_rounding_of_the_residual(
    backend: str, device: torch.device, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(6)
    x, y, gate = (random_tensor(generator, 2, 15, 72, dtype=dtype, device=device) for _ in range(3))
    wide = random_tensor(generator, 2, 15, 72, dtype=torch.float32, device=device)
    assert torch.equal(gated_residual(x, y, gate), x + gate * y)
    assert torch.equal(gated_residual(x, y, wide), x + (wide * y).to(dtype))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", HALVES)
def test_equal_values_in_both_dtypes_give_equal_bits(
    backend: str, device: torch.device, op: str, dtype: torch.dtype
) -> None:
    call = in_dtype(good_call(op, device), dtype)
    wide = copied(call) | {name: call[name].float() for name in ALL if name in call}
    given, expected = run(op, wide), run(op, call)
    assert all(same_bits(one, other) for one, other in zip(given, expected, strict=True))


@pytest.mark.parametrize("op", METERS)
@pytest.mark.parametrize("float8", [False, True])
def test_residual_and_sums_do_not_depend_on_rounding(
    backend: str, device: torch.device, op: str, float8: bool
) -> None:
    call = in_dtype(good_call(op, device, float8=float8), torch.bfloat16)
    call["gate"] = call["gate"].float() * 1.001
    once, twice = copied(call) | {"rounding": "float32"}, copied(call)
    given, expected = run(op, once), run(op, twice)
    assert same_bits(once["residual"], twice["residual"])
    assert same_bits(given[-1], expected[-1])
    assert not same_bits(given[0], expected[0])


def test_reuse_differs_from_the_computed_stream_by_the_rounding_of_the_residual(
    backend: str, device: torch.device
) -> None:
    call = in_dtype(good_call("gated_residual_meter", device), torch.bfloat16)
    call["gate"] = call["gate"].float() * 1.001
    x_out, _ = gated_residual_meter(**call, rounding="float32")
    gate = call["gate"].repeat_interleave(2, 1)
    product = call["y"].float() * gate
    assert torch.equal(call["residual"], product.bfloat16())
    error = (call["x"].float() + call["residual"].float() - x_out.float()).abs()
    unit = 2.0**-8
    bound = unit * (product.abs() + (call["x"].float() + product).abs()) * 1.01
    assert (error <= bound).all()


@pytest.mark.parametrize("op", ["gated_residual_norm", "gated_residual_norm_meter"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_norm_of_the_fused_ops_is_bit_identical_to_that_of_x_out(
    backend: str, device: torch.device, op: str, dtype: torch.dtype, norm: str
) -> None:
    if backend == "triton" and device.type == "cuda":
        pytest.skip("in Triton the order of sums may depend on strides")
    call = in_dtype(good_call(op, device, tables=True), dtype) | {"norm": norm}
    x_out, normed = run(op, call)[:2]
    names = ("shift", "scale", "shift_table", "scale_table", "weight", "bias")
    (expected,) = run(f"{norm}_norm_modulate", {"x": x_out} | {name: call[name] for name in names})
    assert same_bits(normed, expected)


def in_dtype(call: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The call with x and all floating tensors but float8, its scales and tables in this dtype."""
    fixed = ("residual_scale", "gate_table", "shift_table", "scale_table")
    return {
        name: value.to(dtype)
        if isinstance(value, torch.Tensor) and value.dtype == torch.float32 and name not in fixed
        else value
        for name, value in call.items()
    }

# SPDX-License-Identifier: Apache-2.0
"""Offsets beyond 2^31 elements: by large strides, and in large tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from judge import FLOAT8
from op_calls import TOKEN_OPS, copied, good_call, lead, parameters, run, written
from op_cases import same_bits

PAST = 2**31 + 64


def far_apart(tensors: dict[str, torch.Tensor], *, by_row: bool) -> dict[str, torch.Tensor]:
    """Copies of tensors of one size and dtype, interleaved in a buffer whose rows, or first and last tokens,
    are more than 2^31 elements apart. Only touched pages use memory."""
    first = next(iter(tensors.values()))
    rows, tokens, channels = first.shape
    width = len(tensors) * channels
    apart = PAST if by_row else PAST // (tokens - 1)
    strides = (apart, width, 1) if by_row else (width, apart, 1)
    memory = torch.empty(PAST + rows * tokens * width, dtype=first.dtype, device=first.device)
    parts = memory.as_strided((rows, tokens, width), strides).chunk(len(tensors), dim=-1)
    return {name: part.copy_(tensor) for part, (name, tensor) in zip(parts, tensors.items(), strict=True)}


@pytest.mark.parametrize("op", TOKEN_OPS)
@pytest.mark.parametrize("by_row", [True, False], ids=["rows", "tokens"])
def test_offsets_beyond_32_bits(backend: str, device: torch.device, op: str, by_row: bool) -> None:
    float8 = "residual_scale" in parameters(op)
    call = good_call(op, device, float8=float8, outputs=True)
    for name, value in call.items():
        if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
            fixed = name in ("residual_scale", "norm_scale", "coefficients")
            call[name] = value if fixed else value.to(torch.bfloat16)
    if "factors" in call:
        call["factors"] = [factor.to(torch.bfloat16) for factor in call["factors"]]
    expected_call = copied(call)
    expected = run(op, expected_call)
    size = call[lead(op)].shape
    streams = {
        name: value
        for name, value in call.items()
        if isinstance(value, torch.Tensor) and value.shape == size and value.dtype == torch.bfloat16
    }
    streams |= {f"factors[{index}]": factor for index, factor in enumerate(call.get("factors", []))}
    moved: dict[str, Any] = far_apart(streams, by_row=by_row)
    for name in ("residual", "norm_out"):
        if name in call and call[name].dtype == FLOAT8:
            moved |= far_apart({name: call[name]}, by_row=by_row)
    if "factors" in call:
        moved["factors"] = [moved.pop(f"factors[{index}]") for index in range(len(call["factors"]))]
    given = run(op, call | moved)
    for one, other in zip(given, expected, strict=True):
        assert same_bits(one, other)
    for name in written(op):
        if name in call:
            assert same_bits((call | moved)[name], expected_call[name])


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("op", TOKEN_OPS)
def test_more_than_32_bits_of_elements(backend: str, device: torch.device, op: str) -> None:
    """Slightly more than 2^31 elements, in two frames with a gate each. Inputs are one expanded token."""
    if backend == "reference" or (backend == "triton" and device.type == "cpu"):
        pytest.skip(f"{backend} would need minutes and tens of gigabytes")
    channels, places = 128, 2**23 + 5
    generator = torch.Generator().manual_seed(7)
    small: dict[str, Any] = {}
    for name in parameters(op):
        if name in ("x", "y", "x_out", "x_in", "old", "residual", "computed"):
            small[name] = torch.randn(1, 1, channels, generator=generator).expand(1, 2, channels)
        elif name in ("gate", "shift", "scale"):
            small[name] = torch.randn(1, 2, channels, generator=generator)
    small = {name: value.to(torch.bfloat16).to(device) for name, value in small.items()}
    if "frames" in parameters(op):
        small |= {"frames": 2, "metric": "l2"}
    if op.startswith("extrapolate_residual"):
        small |= {"factors": [small["x"], small["x"]], "coefficients": torch.randn(1, 2).to(device)}
    keeps = "residual" in written(op)
    if keeps:
        small["residual"] = small["residual"].to(FLOAT8)
        small["residual_scale"] = torch.rand(1, 1, generator=generator).expand(1, 2).contiguous().to(device)

    large = dict(small)
    for name, value in small.items():
        if name in ("x", "y", "x_out", "x_in", "old", "residual", "computed"):
            large[name] = value[:, :1].expand(1, 2 * places, channels)
    if "factors" in large:
        large["factors"] = [large["x"], large["x"]]
    if keeps:
        large["residual"] = torch.empty(1, 2 * places, channels, dtype=FLOAT8, device=device)
        large["residual"].view(torch.uint8).copy_(small["residual"][:, :1].view(torch.uint8))
        large["residual_scale"] = small["residual_scale"][:, :1].repeat(1, 2 * places)
        small["residual"] = small["residual"].contiguous()
    results = list(run(op, large))
    expected = list(run(op, small))
    if keeps:
        results += [large["residual"].view(torch.uint8), large["residual_scale"][:, :, None]]
        expected += [small["residual"].view(torch.uint8), small["residual_scale"][:, :, None]]
    for one, other in zip(results, expected, strict=True):
        if one.dtype == FLOAT8:
            one, other = one.view(torch.uint8), other.view(torch.uint8)
        if one.dim() == 2:  # sums
            torch.testing.assert_close(one, other * places, rtol=1e-5, atol=0)
            continue
        for frame in range(2):
            for part in one[0, frame * places : (frame + 1) * places].split(2**17):
                assert (part == other[0, frame]).all()

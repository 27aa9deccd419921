# SPDX-License-Identifier: Apache-2.0
"""The attention ops on random supported inputs: error bounds, and two invariants: positions, heads and rows
are independent, and scores depend on differences of angles only.

ADACACHE_PROPERTY_SEED selects another sequence of cases.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy
import pytest
import torch
from attention_cases import (
    ROPES,
    Inputs,
    Shape,
    exact_attention,
    exact_norm_and_rope,
    make_inputs,
    refuse_cuda,
)
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from op_cases import DTYPES, READ_LAYOUTS, same_bits

from adacache_kernels import fused_qk_norm_rope, temporal_attention

SEED = int(os.environ.get("ADACACHE_PROPERTY_SEED", "0"))
FLOAT32_ROUNDING = 2.0**-24


@dataclass(frozen=True)
class Case:
    shape: Shape
    dtype: torch.dtype
    norm: bool
    rope: str
    layout: str
    seed: int
    size: float

    def inputs(self, device: torch.device, **changes: Any) -> Inputs:
        arguments = {"norm": self.norm, "rope": self.rope, "layout": self.layout, "seed": self.seed}
        return make_inputs(self.shape, self.dtype, device, **arguments | {"size": self.size} | changes)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    dim = draw(st.one_of(st.sampled_from([8, 16, 64, 72, 128]), st.integers(1, 140)))
    frames = draw(st.one_of(st.sampled_from([1, 2, 15, 16, 17, 32]), st.integers(1, 64)))
    return Case(
        Shape(draw(st.integers(1, 3)), frames, draw(st.integers(1, 4)), draw(st.integers(1, 4)), dim),
        draw(st.sampled_from(DTYPES)),
        draw(st.booleans()),
        "none" if dim % 2 else draw(st.sampled_from(ROPES)),
        draw(st.sampled_from(READ_LAYOUTS)),
        draw(st.integers(0, 2**32 - 1)),
        draw(st.sampled_from([1.0, 1e-3, 8.0])),
    )


@pytest.fixture(autouse=True)
def _has_op(request: pytest.FixtureRequest) -> None:
    refuse_cuda(request)


def for_all_cases(judge: Callable[[Case], None]) -> None:
    tried = 0

    @seed(SEED)
    @given(cases())
    def run(case: Case) -> None:
        nonlocal tried
        tried += 1
        judge(case)

    print(f"seed {SEED}")
    run()
    assert tried >= settings().max_examples


def attend(inputs: Inputs) -> torch.Tensor:
    return temporal_attention(
        inputs.qkv, *inputs.norm_and_rope, frames=inputs.shape.frames, interleaved=inputs.interleaved
    )


def rounding_of(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def error_of_norm_and_rope(exact: numpy.ndarray, dim: int) -> numpy.ndarray:
    """float32 error bound of one head of q or k: the sum of squares, and a few roundings of numbers no larger
    than the rotated pair."""
    return (dim / 2 + 16) * FLOAT32_ROUNDING * numpy.sqrt(2) * numpy.abs(exact).max(-1, keepdims=True)


@pytest.mark.timeout(3600)
def test_error_of_norm_and_rope(backend: str, device: torch.device) -> None:
    def judge(case: Case) -> None:
        if case.layout.startswith("shared"):
            return  # a shared layout cannot be written in place
        inputs = case.inputs(device)
        exact = exact_norm_and_rope(inputs)
        given = fused_qk_norm_rope(inputs.qkv, *inputs.norm_and_rope, interleaved=inputs.interleaved)
        error = numpy.abs(given.cpu().double().numpy() - exact)
        bound = error_of_norm_and_rope(exact, case.shape.dim)
        bound = bound + (rounding_of(case.dtype) + 2.0**-23) * numpy.abs(exact) + torch.finfo(case.dtype).tiny
        assert (error <= bound).all(), (error / bound).max()
        inputs.buffer.check_surroundings()

    for_all_cases(judge)


@pytest.mark.timeout(3600)
def test_error_of_attention(backend: str, device: torch.device) -> None:
    """The bound allows one rounding of q, k and the weights to the dtype before each product."""

    def judge(case: Case) -> None:
        inputs, shape = case.inputs(device), case.shape
        exact, qkv = exact_attention(inputs), exact_norm_and_rope(inputs)
        error = numpy.abs(attend(inputs).cpu().double().numpy() - exact).max()
        rounding = rounding_of(case.dtype)
        largest = numpy.abs(qkv).max((0, 1, 3, 4))
        products = largest[0] * largest[1] * shape.dim / shape.dim**0.5
        score_error = products * (2 * rounding + (3 * shape.dim + 40) * FLOAT32_ROUNDING)
        bound = largest[2] * (2 * score_error + 2 * rounding + (shape.frames + 16) * FLOAT32_ROUNDING)
        assert error <= bound, (error, bound)

    for_all_cases(judge)


@pytest.mark.timeout(3600)
def test_positions_heads_and_rows_are_independent(backend: str, device: torch.device) -> None:
    """A permutation or a subset gives bit-identical outputs."""
    if backend == "reference":
        pytest.skip("the reference multiplies with BLAS, whose summation order depends on size and layout")

    def judge(case: Case) -> None:
        if "by token" in case.rope:
            return  # these angles depend on the position
        inputs, shape = case.inputs(device), case.shape
        if backend == "triton" and device.type == "cuda":
            # Triton recompiles for other strides, which may change the summation order of a norm.
            inputs = Inputs(**vars(inputs) | {"qkv": inputs.qkv.contiguous()})
        y = attend(inputs).unflatten(2, (shape.heads, shape.dim))
        generator = torch.Generator().manual_seed(case.seed)
        rows = torch.randperm(shape.rows, generator=generator)[: max(1, shape.rows - 1)]
        heads = torch.randperm(shape.heads, generator=generator)
        places = torch.randperm(shape.places, generator=generator)
        tokens = (torch.arange(shape.frames)[:, None] * shape.places + places).flatten()

        def picked(tensor: torch.Tensor, axis_of_heads: int) -> torch.Tensor:
            chosen = tensor.index_select(0, rows.to(device)).index_select(1, tokens.to(device))
            return chosen.index_select(axis_of_heads, heads.to(device))

        others = Inputs(**vars(inputs) | {"qkv": picked(inputs.qkv, 3)})
        assert same_bits(attend(others).unflatten(2, (shape.heads, shape.dim)), picked(y, 2))

    for_all_cases(judge)


@pytest.mark.timeout(3600)
def test_scores_depend_on_angle_differences_only(backend: str, device: torch.device) -> None:
    """Rotating all frames by equal angles does not change the scores (arXiv 2104.09864)."""

    def judge(case: Case) -> None:
        if case.rope == "none" or case.size > 1:
            return
        inputs = case.inputs(device, layout="contiguous")
        wide = Inputs(**vars(inputs) | {"qkv": inputs.qkv.float()})
        if wide.q_weight is not None and wide.k_weight is not None:
            wide.q_weight, wide.k_weight = wide.q_weight.float(), wide.k_weight.float()
        assert wide.cos is not None
        assert wide.sin is not None
        angle = torch.atan2(wide.sin, wide.cos)
        # The angle differs per pair and is equal for all frames.
        more = angle + torch.linspace(-2, 2, angle.shape[1], device=device)
        turned = Inputs(**vars(wide) | {"cos": more.cos(), "sin": more.sin()})
        torch.testing.assert_close(attend(turned), attend(wide), rtol=1e-4, atol=1e-4)

    for_all_cases(judge)

# SPDX-License-Identifier: Apache-2.0
"""fused_qk_norm_rope: error against float64 relative to that of PyTorch, unchanged values, layouts, bad
input."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from attention_cases import (
    EMPTY_SHAPES,
    ODD_SHAPES,
    ROPES,
    SHAPES,
    Shape,
    check_error,
    eager_norm_and_rope,
    exact_norm_and_rope,
    make_inputs,
    refuse_cuda,
)
from op_cases import DTYPES, LAYOUTS, same_bits

from adacache_kernels import fused_qk_norm_rope

SMALL = Shape(2, 5, 3, 2, 24)


@pytest.fixture(autouse=True)
def _has_op(request: pytest.FixtureRequest) -> None:
    refuse_cuda(request)


def run_and_check(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    *,
    norm: bool = True,
    rope: str = "interleaved",
    layout: str = "contiguous",
    seed: int = 0,
    eps: float = 1e-6,
) -> None:
    inputs = make_inputs(shape, dtype, device, norm=norm, rope=rope, layout=layout, seed=seed)
    before, exact, eager = (
        inputs.qkv.clone(),
        exact_norm_and_rope(inputs, eps),
        eager_norm_and_rope(inputs, eps),
    )
    given = fused_qk_norm_rope(inputs.qkv, *inputs.norm_and_rope, interleaved=inputs.interleaved, eps=eps)
    assert given is inputs.qkv
    if given.numel():
        check_error(given, exact, eager)
    assert same_bits(given[:, :, 2], before[:, :, 2])
    if not norm and rope == "none":
        assert same_bits(given, before)
    inputs.buffer.check_surroundings()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error(backend: str, device: torch.device, shape: Shape, rope: str, dtype: torch.dtype) -> None:
    run_and_check(shape, dtype, device, rope=rope)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("shape", ODD_SHAPES + EMPTY_SHAPES, ids=str)
def test_without_rope(
    backend: str, device: torch.device, shape: Shape, norm: bool, dtype: torch.dtype
) -> None:
    run_and_check(shape, dtype, device, norm=norm, rope="none")


@pytest.mark.parametrize("rope", ROPES[1:])
def test_rope_alone(backend: str, device: torch.device, rope: str) -> None:
    for dtype in DTYPES:
        run_and_check(SMALL, dtype, device, norm=False, rope=rope)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend: str, device: torch.device, layout: str, dtype: torch.dtype) -> None:
    run_and_check(SMALL, dtype, device, layout=layout)
    run_and_check(Shape(2, 9, 3, 1, 9), dtype, device, layout=layout, rope="none")


@pytest.mark.parametrize("seed", range(8))
def test_random_cases(backend: str, device: torch.device, seed: int) -> None:
    pick = random.Random(400 + seed)
    dim = pick.randint(1, 100)
    shape = Shape(pick.randint(1, 3), pick.randint(1, 40), pick.randint(1, 5), pick.randint(1, 20), dim)
    case: dict[str, Any] = {
        "norm": pick.random() < 0.7,
        "rope": "none" if dim % 2 else pick.choice(ROPES),
        "layout": pick.choice(LAYOUTS),
        "eps": pick.choice([1e-6, 0.0, 0.5]),
    }
    dtype = pick.choice(DTYPES)
    print(f"seed {seed}: {shape} {dtype} {case}")
    run_and_check(shape, dtype, device, seed=seed, **case)


def test_angles_of_any_divisor(backend: str, device: torch.device) -> None:
    """The number of rows determines how many consecutive tokens share a row."""
    inputs = make_inputs(Shape(1, 12, 1, 2, 8), torch.float32, device, norm=False, rope="none")
    for rows in (1, 2, 3, 4, 6, 12):
        angle = torch.randn(rows, 4, device=device)
        tables = angle.cos(), angle.sin()
        by_token = [table.repeat_interleave(12 // rows, 0) for table in tables]
        given = fused_qk_norm_rope(inputs.qkv.clone(), None, None, *tables)
        assert same_bits(given, fused_qk_norm_rope(inputs.qkv.clone(), None, None, *by_token))


def test_zero_rotation_is_bit_identical(backend: str, device: torch.device) -> None:
    for dtype in DTYPES:
        inputs = make_inputs(SMALL, dtype, device, norm=False, rope="none")
        before = inputs.qkv.clone()
        one = torch.ones(SMALL.frames, SMALL.dim // 2, device=device)
        for interleaved in (True, False):
            fused_qk_norm_rope(inputs.qkv, None, None, one, torch.zeros_like(one), interleaved=interleaved)
            assert same_bits(inputs.qkv, before)


def test_nan_stays_in_its_head(backend: str, device: torch.device) -> None:
    inputs = make_inputs(SMALL, torch.float32, device)
    poisoned = inputs.qkv.clone()
    poisoned[1, 7, 0, 1, 3] = torch.nan
    poisoned[0, 2, 1, 0, 5] = torch.inf
    clean = fused_qk_norm_rope(inputs.qkv, *inputs.norm_and_rope)
    fused_qk_norm_rope(poisoned, *inputs.norm_and_rope)
    assert poisoned[1, 7, 0, 1].isnan().all()
    assert poisoned[0, 2, 1, 0, 4:6].isnan().all()
    for index in ((1, 7, 0, 1), (0, 2, 1, 0)):
        poisoned[index] = clean[index]
    assert same_bits(poisoned, clean)


@pytest.mark.parametrize("dtype", DTYPES)
def test_deterministic(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    shape = Shape(2, 15, 37, 4, 72)
    if device.type == "cpu" and backend == "triton":
        shape = SMALL  # the interpreter is slow
    inputs = make_inputs(shape, dtype, device)
    copies = [inputs.qkv.clone() for _ in range(3)]
    first = fused_qk_norm_rope(inputs.qkv, *inputs.norm_and_rope)
    assert same_bits(fused_qk_norm_rope(copies[0], *inputs.norm_and_rope), first)
    if backend == "cpu":
        threads = torch.get_num_threads()
        try:
            for count in (1, 2):
                torch.set_num_threads(2 * count - 1)
                assert same_bits(fused_qk_norm_rope(copies[count], *inputs.norm_and_rope), first)
        finally:
            torch.set_num_threads(threads)


def test_autocast_casts_weights(backend: str, device: torch.device) -> None:
    inputs = make_inputs(SMALL, torch.bfloat16, device)
    assert inputs.q_weight is not None
    assert inputs.k_weight is not None
    copy = inputs.qkv.clone()
    fused_qk_norm_rope(inputs.qkv, *inputs.norm_and_rope)
    with torch.autocast(device.type, torch.bfloat16):
        fused_qk_norm_rope(copy, inputs.q_weight.float(), inputs.k_weight.float(), inputs.cos, inputs.sin)
    assert same_bits(copy, inputs.qkv)


@pytest.mark.parametrize("name", ["qkv", "k_weight", "sin"])
def test_requires_grad_is_refused(backend: str, device: torch.device, name: str) -> None:
    call = good_call(device)
    call[name].requires_grad_()
    with pytest.raises(ValueError, match=f"{name}: requires grad"):
        fused_qk_norm_rope(**call)


def good_call(device: torch.device | str) -> dict[str, Any]:
    inputs = make_inputs(SMALL, torch.float32, device)
    return {
        "qkv": inputs.qkv,
        "q_weight": inputs.q_weight,
        "k_weight": inputs.k_weight,
        "cos": inputs.cos,
        "sin": inputs.sin,
    }


def bad_inputs() -> dict[str, tuple[str, dict[str, Any]]]:
    """Per test id: the argument that the error must name, and the changes to `good_call`."""
    rows, tokens, heads, dim = SMALL.rows, SMALL.tokens, SMALL.heads, SMALL.dim
    no_weights = {"q_weight": None, "k_weight": None}
    return {
        "qkv of four dimensions": ("qkv", {"qkv": torch.randn(rows, tokens, 3, heads * dim)}),
        "two parts": ("qkv", {"qkv": torch.randn(rows, tokens, 2, heads, dim)}),
        "qkv of float64": ("qkv", {"qkv": torch.randn(rows, tokens, 3, heads, dim).double()}),
        "qkv with strided dim": ("qkv", {"qkv": torch.randn(rows, tokens, 3, heads, 2 * dim)[..., ::2]}),
        "qkv expanded": ("qkv", {"qkv": torch.randn(1, tokens, 3, heads, dim).expand(rows, -1, -1, -1, -1)}),
        "dim of 258": (
            "qkv",
            {"qkv": torch.randn(1, 5, 3, 1, 258), **no_weights, "cos": None, "sin": None},
        ),
        "odd dim with angles": ("qkv", {"qkv": torch.randn(rows, tokens, 3, heads, dim - 1), **no_weights}),
        "q_weight of another dim": ("q_weight", {"q_weight": torch.randn(dim + 1)}),
        "q_weight of another dtype": ("q_weight", {"q_weight": torch.randn(dim).half()}),
        "k_weight on another device": ("k_weight", {"k_weight": torch.randn(dim, device="meta")}),
        "q_weight without k_weight": ("k_weight", {"k_weight": None}),
        "cos without sin": ("sin", {"sin": None}),
        "sin without cos": ("cos", {"cos": None}),
        "cos of full dim": ("cos", {"cos": torch.randn(SMALL.frames, dim)}),
        "cos rows not a divisor": ("cos", {"cos": torch.randn(4, dim // 2)}),
        "cos without rows": ("cos", {"cos": torch.randn(0, dim // 2)}),
        "cos of float64": ("cos", {"cos": torch.randn(SMALL.frames, dim // 2).double()}),
        "sin of another length": ("sin", {"sin": torch.randn(tokens, dim // 2)}),
        "sin not contiguous": ("sin", {"sin": torch.randn(SMALL.frames, dim)[:, ::2]}),
        "negative eps": ("eps", {"eps": -1e-6}),
    }


@pytest.mark.parametrize("what", bad_inputs(), ids=lambda what: what.replace(" ", "_"))
def test_bad_input_names_the_argument(backend: str, device: torch.device, what: str) -> None:
    with device:  # the default device of factory functions
        name, changes = bad_inputs()[what]
    call = good_call(device)
    with pytest.raises(ValueError, match=f"^{name}: "):
        fused_qk_norm_rope(**call | changes)
    fused_qk_norm_rope(**call)


def test_weights_must_not_share_memory(backend: str, device: torch.device) -> None:
    memory = torch.randn(24 * 8, device=device)
    qkv = memory.view(1, 8, 3, 1, 8)
    with pytest.raises(ValueError, match=r"^qkv: .*q_weight"):
        fused_qk_norm_rope(qkv, memory[:8], torch.ones(8, device=device), None, None)


def test_compile_without_graph_breaks(backend: str, device: torch.device) -> None:
    inputs = make_inputs(SMALL, torch.float32, device)

    def step(qkv: torch.Tensor) -> torch.Tensor:
        doubled = qkv * 2
        return fused_qk_norm_rope(doubled, *inputs.norm_and_rope).sum(2) + doubled[:, :, 0]

    given = torch.compile(step, fullgraph=True, backend="aot_eager")(inputs.qkv)
    assert same_bits(given, step(inputs.qkv))


def test_opcheck(backend: str, device: torch.device, op_namespace: str) -> None:
    op = getattr(torch.ops, op_namespace).fused_qk_norm_rope.default
    for layout, rope in (("contiguous", "interleaved"), ("channel_slice", "halves"), ("rows_inside", "none")):
        inputs = make_inputs(SMALL, torch.float32, device, layout=layout, rope=rope)
        torch.library.opcheck(op, (inputs.qkv, *inputs.norm_and_rope, inputs.interleaved, 1e-6))

# SPDX-License-Identifier: Apache-2.0
"""temporal_attention: error against float64 relative to that of PyTorch, layouts, propagation of NaN, bad
input."""

from __future__ import annotations

import os
import platform
import random
import subprocess
import sys
from pathlib import Path
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
    eager_attention,
    exact_attention,
    make_inputs,
    refuse_cuda,
)
from op_cases import DTYPES, LAYOUTS, READ_LAYOUTS, Buffer, same_bits

from adacache_kernels import build_info, fused_qk_norm_rope, temporal_attention

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
    out_layout: str | None = None,
    scale: float | None = None,
    seed: int = 0,
    size: float = 1.0,
    floor: float = 0.0,
) -> None:
    inputs = make_inputs(shape, dtype, device, norm=norm, rope=rope, layout=layout, seed=seed, size=size)
    before = inputs.qkv.clone()
    out = None
    if out_layout is not None:
        nothing = torch.full(
            (shape.rows, shape.tokens, shape.heads * shape.dim), torch.nan, dtype=dtype, device=device
        )
        out = Buffer(nothing, out_layout)
    y = temporal_attention(
        inputs.qkv,
        *inputs.norm_and_rope,
        frames=shape.frames,
        interleaved=inputs.interleaved,
        scale=scale,
        out=None if out is None else out.tensor,
    )
    assert y.shape == (shape.rows, shape.tokens, shape.heads * shape.dim)
    if y.numel():
        check_error(y, exact_attention(inputs, scale), *eager_attention(inputs, scale), floor=floor)
    assert same_bits(inputs.qkv, before)
    if out is None:
        assert y.is_contiguous()
    else:
        assert y is out.tensor
        out.check_surroundings()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.sampled(4)
def test_error(backend: str, device: torch.device, shape: Shape, rope: str, dtype: torch.dtype) -> None:
    run_and_check(shape, dtype, device, rope=rope)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("shape", SHAPES + ODD_SHAPES + EMPTY_SHAPES, ids=str)
@pytest.mark.sampled(4)
def test_without_rope(
    backend: str, device: torch.device, shape: Shape, norm: bool, dtype: torch.dtype
) -> None:
    run_and_check(shape, dtype, device, norm=norm, rope="none")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", READ_LAYOUTS)
def test_layouts(backend: str, device: torch.device, layout: str, dtype: torch.dtype) -> None:
    run_and_check(SMALL, dtype, device, layout=layout)
    run_and_check(Shape(2, 4, 3, 1, 9), dtype, device, layout=layout, rope="none")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_layout", LAYOUTS)
def test_out(backend: str, device: torch.device, out_layout: str, dtype: torch.dtype) -> None:
    run_and_check(SMALL, dtype, device, out_layout=out_layout)
    run_and_check(Shape(2, 4, 3, 1, 9), dtype, device, out_layout=out_layout, rope="none")


@pytest.mark.parametrize("seed", range(8))
def test_random_cases(backend: str, device: torch.device, seed: int) -> None:
    pick = random.Random(300 + seed)
    dim = pick.randint(1, 100)
    shape = Shape(pick.randint(1, 3), pick.randint(1, 40), pick.randint(1, 5), pick.randint(1, 4), dim)
    case: dict[str, Any] = {
        "norm": pick.random() < 0.5,
        "rope": "none" if dim % 2 else pick.choice(ROPES),
        "layout": pick.choice(LAYOUTS),
        "out_layout": pick.choice([None, *LAYOUTS]),
        "scale": pick.choice([None, 0.3, -0.2, 0.0]),
    }
    dtype = pick.choice(DTYPES)
    print(f"seed {seed}: {shape} {dtype} {case}")
    run_and_check(shape, dtype, device, seed=seed, **case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("frames", [2, 15, 40])
def test_large_score_range(backend: str, device: torch.device, frames: int, dtype: torch.dtype) -> None:
    """Scores of several hundred: a softmax without subtraction of the maximum would overflow. One rounding of
    a score of 1000 changes a weight by up to 6e-5, for values up to 50."""
    shape = Shape(1, frames, 2, 2, 32)
    run_and_check(shape, dtype, device, norm=False, rope="none", size=12.0, floor=6e-5 * 50)


def test_single_frame_returns_v(backend: str, device: torch.device) -> None:
    for dtype in DTYPES:
        inputs = make_inputs(Shape(2, 1, 5, 2, 12), dtype, device)
        y = temporal_attention(inputs.qkv, *inputs.norm_and_rope, frames=1)
        assert same_bits(y, inputs.qkv[:, :, 2].flatten(2))


def test_nan_stays_at_its_position_and_head(backend: str, device: torch.device) -> None:
    shape = Shape(2, 6, 4, 3, 20)
    inputs = make_inputs(shape, torch.float32, device)
    call: dict[str, Any] = {"frames": shape.frames}
    clean = temporal_attention(inputs.qkv, *inputs.norm_and_rope, **call)
    token = 3 * shape.places + 1
    for part in range(3):
        poisoned = inputs.qkv.clone()
        poisoned[1, token, part, 2, 7] = torch.nan
        y = temporal_attention(poisoned, *inputs.norm_and_rope, **call).unflatten(2, (shape.heads, shape.dim))
        reached = torch.zeros_like(y, dtype=torch.bool)
        if part == 0:
            reached[1, token, 2] = True  # one query
        elif part == 1:
            reached[1, 1 :: shape.places, 2] = True  # one key, of all queries
        else:
            reached[1, 1 :: shape.places, 2, 7] = True
        assert y[reached].isnan().all()
        expected = torch.where(reached, y, clean.unflatten(2, (shape.heads, shape.dim)))
        assert same_bits(y, expected)


def test_infinite_scores_give_nan(backend: str, device: torch.device) -> None:
    """inf - inf is NaN, as in softmax of PyTorch; other tokens are finite."""
    inputs = make_inputs(Shape(1, 3, 2, 1, 8), torch.float32, device, norm=False, rope="none")
    inputs.qkv[0, 0, 0] = torch.inf
    y = temporal_attention(inputs.qkv, frames=3)
    assert y[0, 0].isnan().all()
    assert y[0, 1:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_deterministic(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    shape = Shape(2, 15, 37, 4, 72)
    if device.type == "cpu" and backend == "triton":
        shape = SMALL  # the interpreter is slow
    inputs = make_inputs(shape, dtype, device)
    call: dict[str, Any] = {"frames": shape.frames}
    first = temporal_attention(inputs.qkv, *inputs.norm_and_rope, **call)
    out = torch.full_like(first, torch.nan)
    assert same_bits(temporal_attention(inputs.qkv, *inputs.norm_and_rope, out=out, **call), first)
    if backend == "cpu":
        threads = torch.get_num_threads()
        try:
            for count in (1, 3):
                torch.set_num_threads(count)
                assert same_bits(temporal_attention(inputs.qkv, *inputs.norm_and_rope, **call), first)
        finally:
            torch.set_num_threads(threads)


#: Prints a digest of the results of both ops for all dtypes, rotations and several shapes.
DIGEST = """
import hashlib, sys
sys.path.insert(0, "tests/ops")
import torch
from attention_cases import ODD_SHAPES, ROPES, SHAPES, make_inputs
from op_cases import DTYPES
import adacache_kernels

digest = hashlib.sha256()
with adacache_kernels.use_backend("cpu"):
    for shape in SHAPES[:6] + ODD_SHAPES:
        for rope in ROPES[:3] if shape.dim % 2 == 0 else ["none"]:
            for dtype in DTYPES:
                inputs = make_inputs(shape, dtype, "cpu", rope=rope, size=2.0)
                call = {"interleaved": inputs.interleaved}
                y = adacache_kernels.temporal_attention(
                    inputs.qkv, *inputs.norm_and_rope, frames=shape.frames, **call
                )
                adacache_kernels.fused_qk_norm_rope(inputs.qkv, *inputs.norm_and_rope, **call)
                for tensor in (y, inputs.qkv):
                    digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def test_instruction_sets_are_bit_identical() -> None:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("several instruction sets are built on x86-64 only")
    if not build_info()["libraries"]["cpu"]["loaded"]:
        pytest.skip("the compiled cpu library is not loaded")
    digests = {}
    for name in ("baseline", "avx2", "avx512"):  # unsupported ones fall back to the next lower
        run = subprocess.run(
            [sys.executable, "-c", DIGEST],
            env=os.environ | {"ADACACHE_CPU_ISA": name},
            cwd=Path(__file__).resolve().parents[2],
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
        digests[name] = run.stdout
    assert len(set(digests.values())) == 1, digests


def test_fused_and_separate_norm_and_rope_agree(backend: str, device: torch.device) -> None:
    """In float32 there is no rounding between the ops: bit-identical on the CPU, close on tensor cores."""
    inputs = make_inputs(SMALL, torch.float32, device)
    within = temporal_attention(inputs.qkv, *inputs.norm_and_rope, frames=SMALL.frames)
    fused_qk_norm_rope(inputs.qkv, *inputs.norm_and_rope)
    before = temporal_attention(inputs.qkv, frames=SMALL.frames)
    if backend == "cpu":
        assert same_bits(within, before)
    torch.testing.assert_close(within, before, rtol=1e-5, atol=1e-5)


def test_scale(backend: str, device: torch.device) -> None:
    inputs = make_inputs(SMALL, torch.float32, device)
    given = temporal_attention(inputs.qkv, frames=SMALL.frames, scale=SMALL.dim**-0.5)
    assert same_bits(given, temporal_attention(inputs.qkv, frames=SMALL.frames))
    mean = temporal_attention(inputs.qkv, frames=SMALL.frames, scale=0.0)
    values = inputs.qkv[:, :, 2].unflatten(1, (SMALL.frames, SMALL.places)).mean(1, keepdim=True)
    expected = values.expand(-1, SMALL.frames, -1, -1, -1).flatten(1, 2).flatten(2)
    torch.testing.assert_close(mean, expected, rtol=1e-6, atol=1e-6)


def test_eps(backend: str, device: torch.device) -> None:
    inputs = make_inputs(SMALL, torch.float32, device, size=1e-2)
    call: dict[str, Any] = {"frames": SMALL.frames, "eps": 0.1}
    y = temporal_attention(inputs.qkv, *inputs.norm_and_rope, **call)
    check_error(y, exact_attention(inputs, eps=0.1), *eager_attention(inputs, eps=0.1))


def test_autocast_casts_weights(backend: str, device: torch.device) -> None:
    inputs = make_inputs(SMALL, torch.bfloat16, device)
    assert inputs.q_weight is not None
    assert inputs.k_weight is not None
    expected = temporal_attention(inputs.qkv, *inputs.norm_and_rope, frames=SMALL.frames)
    wide = (inputs.q_weight.float(), inputs.k_weight.float(), inputs.cos, inputs.sin)
    with pytest.raises(ValueError, match=r"^q_weight: "):
        temporal_attention(inputs.qkv, *wide, frames=SMALL.frames)
    with torch.autocast(device.type, torch.bfloat16):
        given = temporal_attention(inputs.qkv, *wide, frames=SMALL.frames)
    assert same_bits(given, expected)


@pytest.mark.parametrize("name", ["qkv", "q_weight", "cos", "out"])
def test_requires_grad_is_refused(backend: str, device: torch.device, name: str) -> None:
    call = good_call(device)
    call[name].requires_grad_()
    with pytest.raises(ValueError, match=f"{name}: requires grad"):
        temporal_attention(**call)


def good_call(device: torch.device | str) -> dict[str, Any]:
    inputs = make_inputs(SMALL, torch.float32, device)
    return {
        "qkv": inputs.qkv,
        "q_weight": inputs.q_weight,
        "k_weight": inputs.k_weight,
        "cos": inputs.cos,
        "sin": inputs.sin,
        "frames": SMALL.frames,
        "out": torch.empty(SMALL.rows, SMALL.tokens, SMALL.heads * SMALL.dim, device=device),
    }


def bad_inputs() -> dict[str, tuple[str, dict[str, Any]]]:
    """Per test id: the argument that the error must name, and the changes to `good_call`."""
    rows, tokens, heads, dim = SMALL.rows, SMALL.tokens, SMALL.heads, SMALL.dim
    channels = heads * dim
    plain = {"q_weight": None, "k_weight": None, "cos": None, "sin": None}
    odd = torch.randn(rows, tokens, 3, heads, dim - 1)
    long = torch.randn(1, 65, 3, 1, 4)
    return {
        "qkv of three dimensions": ("qkv", {"qkv": torch.randn(rows, tokens, 3 * channels)}),
        "two parts": ("qkv", {"qkv": torch.randn(rows, tokens, 2, heads, dim)}),
        "qkv of float64": ("qkv", {"qkv": torch.randn(rows, tokens, 3, heads, dim).double()}),
        "qkv with strided dim": ("qkv", {"qkv": torch.randn(rows, tokens, 3, heads, 2 * dim)[..., ::2]}),
        "heads and parts swapped": (
            "qkv",
            {"qkv": torch.randn(rows, tokens, heads, 3, dim).transpose(2, 3)},
        ),
        "dim of 257": ("qkv", {"qkv": torch.randn(1, 5, 3, 1, 257), **plain, "out": None}),
        "odd dim with angles": (
            "qkv",
            {"qkv": odd, "q_weight": None, "k_weight": None, "out": None},
        ),
        "q_weight of another dim": ("q_weight", {"q_weight": torch.randn(dim + 1)}),
        "q_weight of another dtype": ("q_weight", {"q_weight": torch.randn(dim).bfloat16()}),
        "q_weight on another device": ("q_weight", {"q_weight": torch.randn(dim, device="meta")}),
        "q_weight not contiguous": ("q_weight", {"q_weight": torch.randn(2 * dim)[::2]}),
        "q_weight without k_weight": ("k_weight", {"k_weight": None}),
        "k_weight without q_weight": ("q_weight", {"q_weight": None}),
        "k_weight of two dimensions": ("k_weight", {"k_weight": torch.randn(1, dim)}),
        "cos without sin": ("sin", {"sin": None}),
        "sin without cos": ("cos", {"cos": None}),
        "cos of full dim": ("cos", {"cos": torch.randn(SMALL.frames, dim)}),
        "cos of another length": ("cos", {"cos": torch.randn(SMALL.places, dim // 2)}),
        "cos of bfloat16": ("cos", {"cos": torch.randn(SMALL.frames, dim // 2).bfloat16()}),
        "cos not contiguous": ("cos", {"cos": torch.randn(SMALL.frames, dim)[:, ::2]}),
        "sin of another length": ("sin", {"sin": torch.randn(tokens, dim // 2)}),
        "sin on another device": ("sin", {"sin": torch.randn(SMALL.frames, dim // 2, device="meta")}),
        "0 frames": ("frames", {"frames": 0}),
        "65 frames": ("frames", {"qkv": long, **plain, "frames": 65, "out": None}),
        "frames not a divisor": ("frames", {"frames": 4}),
        "negative eps": ("eps", {"eps": -1.0}),
        "out of another shape": ("out", {"out": torch.empty(rows, tokens, channels + 1)}),
        "out of four dimensions": ("out", {"out": torch.empty(rows, tokens, heads, dim)}),
        "out of another dtype": ("out", {"out": torch.empty(rows, tokens, channels).half()}),
        "out with strided channels": ("out", {"out": torch.empty(rows, tokens, 2 * channels)[:, :, ::2]}),
        "out expanded": ("out", {"out": torch.empty(1, tokens, channels).expand(rows, -1, -1)}),
    }


@pytest.mark.parametrize("what", bad_inputs(), ids=lambda what: what.replace(" ", "_"))
def test_bad_input_names_the_argument(backend: str, device: torch.device, what: str) -> None:
    with device:  # the default device of factory functions
        name, changes = bad_inputs()[what]
    call = good_call(device)
    if "meta" not in str(changes.get(name, "")):
        temporal_attention(**call)
    with pytest.raises(ValueError, match=f"^{name}: "):
        temporal_attention(**call | changes)


def test_out_must_not_share_memory(backend: str, device: torch.device) -> None:
    shape = Shape(1, 2, 2, 1, 8)
    memory = torch.randn(1, shape.tokens, 32, device=device)
    qkv = memory[:, :, :24].unflatten(2, (3, 1, 8))
    with pytest.raises(ValueError, match=r"^out: .*qkv"):
        temporal_attention(qkv, frames=2, out=memory[:, :, 16:24])
    angles = torch.randn(2, 2, 4, device=device)
    out = angles.view(1, 2, 8)
    with pytest.raises(ValueError, match=r"^out: .*cos"):
        temporal_attention(qkv[:, :2], None, None, *angles, frames=2, out=out)


def test_compile_without_graph_breaks(backend: str, device: torch.device) -> None:
    inputs = make_inputs(SMALL, torch.float32, device)

    def step(qkv: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        first = temporal_attention(qkv * 2, *inputs.norm_and_rope, frames=SMALL.frames)
        second = temporal_attention(qkv, frames=SMALL.frames, out=out)
        return first + second

    out = torch.full((SMALL.rows, SMALL.tokens, SMALL.heads * SMALL.dim), torch.nan, device=device)
    given = torch.compile(step, fullgraph=True, backend="aot_eager")(inputs.qkv, out)
    other = torch.empty_like(out)
    assert same_bits(given, step(inputs.qkv, other))
    assert same_bits(out, other)


def test_opcheck(backend: str, device: torch.device, op_namespace: str) -> None:
    ops = getattr(torch.ops, op_namespace)
    for layout, rope in (("contiguous", "interleaved"), ("channel_slice", "halves"), ("rows_inside", "none")):
        inputs = make_inputs(SMALL, torch.float32, device, layout=layout, rope=rope)
        arguments = (inputs.qkv, *inputs.norm_and_rope, inputs.interleaved, SMALL.frames, 1e-6, 0.2)
        out = torch.empty(SMALL.rows, SMALL.tokens, SMALL.heads * SMALL.dim, device=device)
        torch.library.opcheck(ops.temporal_attention_out.default, (*arguments, out))
        if op_namespace == "adacache":
            torch.library.opcheck(ops.temporal_attention.default, arguments)

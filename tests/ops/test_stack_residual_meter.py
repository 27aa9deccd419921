# SPDX-License-Identifier: Apache-2.0
"""stack_residual_meter: bit-identical residual, float8 caches, sums against float64, scattered rows, over
shapes, layouts, videos and unusual values."""

from __future__ import annotations

import pytest
import torch
from judge import FLOAT8, JUDGES, VALUES, Case
from op_cases import DTYPES, EMPTY_SHAPES, READ_LAYOUTS, SHAPES, Shape, random_tensor, same_bits

from adacache_kernels import decide, initial_state, residual_meter, stack_residual_meter

judge = JUDGES["stack_residual_meter"]


@pytest.mark.parametrize("kept", [None, FLOAT8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES + EMPTY_SHAPES, ids=str)
@pytest.mark.parametrize("metric", ["l1", "l2"])
def test_shapes(
    backend: str,
    device: torch.device,
    shape: Shape,
    dtype: torch.dtype,
    metric: str,
    kept: torch.dtype | None,
) -> None:
    judge(Case(shape, dtype, metric=metric, kept=kept), device)


@pytest.mark.parametrize("layout", READ_LAYOUTS)
@pytest.mark.parametrize("out", ["fresh", "given", "x"])
@pytest.mark.parametrize("kept", [None, FLOAT8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(
    backend: str, device: torch.device, layout: str, out: str, kept: torch.dtype | None, dtype: torch.dtype
) -> None:
    judge(Case(dtype=dtype, layouts=(layout,), out=out, kept=kept, strides=(1, 2), seed=1), device)


@pytest.mark.parametrize("total", [2, 5])
@pytest.mark.parametrize("out", ["fresh", "given", "x"])
@pytest.mark.parametrize("kept", [None, FLOAT8])
def test_indexed_rows(
    backend: str, device: torch.device, total: int, out: str, kept: torch.dtype | None
) -> None:
    for dtype in DTYPES:
        judge(Case(dtype=dtype, kept_total=total, out=out, kept=kept, seed=2), device)


@pytest.mark.parametrize("strides", [(), (2,), (1, 2, 4), (1, 2, 3, 4, 1, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("kept", [None, FLOAT8])
def test_strides(
    backend: str, device: torch.device, strides: tuple[int, ...], kept: torch.dtype | None
) -> None:
    judge(Case(Shape(2, 5, 7, 24), strides=strides, metric="cosine", kept=kept, seed=3), device)


@pytest.mark.parametrize("metric", ["l1", "cosine"])
def test_videos_of_uneven_size(backend: str, device: torch.device, metric: str) -> None:
    judge(Case(Shape(4, 3, 5, 33), videos=(1, 3, 1, 1), num_videos=5, metric=metric), device)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kept", [None, FLOAT8])
def test_unusual_values(
    backend: str, device: torch.device, values: str, dtype: torch.dtype, kept: torch.dtype | None
) -> None:
    judge(Case(dtype=dtype, values=values, kept=kept, metric="l2", seed=4), device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_residual_meter(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    x_out, x_in, old = (random_tensor(generator, 2, 12, 40, dtype=dtype, device=device) for _ in range(3))
    kept = old.clone()
    sums = stack_residual_meter(x_out, x_in, kept, frames=3, strides=(1, 2), metric="l2")
    assert same_bits(kept, x_out - x_in)
    alone = residual_meter(kept, old, frames=3, strides=(1, 2), metric="l2")
    torch.testing.assert_close(sums, alone, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("kept", [None, FLOAT8])
def test_a_difference_beyond_float16_is_flagged(
    backend: str, device: torch.device, kept: torch.dtype | None
) -> None:
    """The difference of two finite float16 streams may overflow. R is then infinite, as in eager PyTorch, the
    sums of the video are non-finite, and `decide` computes the next step and sets nonfinite."""
    x_out = torch.full((2, 4, 16), 1.0, dtype=torch.float16, device=device)
    x_in = torch.full_like(x_out, 0.5)
    x_out[1, 2, 3], x_in[1, 2, 3] = 40000.0, -40000.0
    residual = torch.zeros_like(x_out).to(kept or torch.float16)
    scale = torch.ones(2, 4, device=device) if kept else None
    videos = torch.tensor([0, 1], dtype=torch.int32, device=device)
    sums = stack_residual_meter(
        x_out, x_in, residual, frames=2, video_of_row=videos, num_videos=2, residual_scale=scale
    )
    if not kept:
        assert same_bits(residual, x_out - x_in)
    assert sums[0, :3].isfinite().all()
    assert not sums[1, 0].isfinite()
    state = initial_state(2, device=device)
    codebook = torch.tensor([9.0], dtype=torch.float64, device=device)
    for step in (1, 2):
        decide(
            sums,
            state,
            step=step,
            num_steps=9,
            thresholds=codebook,
            rates=codebook // 3,
            frames=2,
            metric="l1",
        )
    assert state[:, 1].tolist() == [1, 1]
    assert state[:, 9].tolist() == [1, 1]

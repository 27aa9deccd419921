# SPDX-License-Identifier: Apache-2.0
"""gated_residual_meter: bit-identical x_out and residual, float8 caches, sums against float64, over shapes,
gates, layouts, row indices, videos and unusual values."""

from __future__ import annotations

import pytest
import torch
from judge import FLOAT8, JUDGES, MODULATORS, VALUES, Case
from op_calls import good_call, run
from op_cases import (
    DTYPES,
    EMPTY_SHAPES,
    READ_LAYOUTS,
    SHAPES,
    Shape,
    random_tensor,
    same_bits,
    video_ids,
)

import adacache_kernels
from adacache_kernels import gated_residual_meter

judge = JUDGES["gated_residual_meter"]


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
    judge(Case(shape, dtype, metric=metric, kept=kept), device)


@pytest.mark.parametrize("kept", [None, FLOAT8])
@pytest.mark.parametrize("shape", EMPTY_SHAPES, ids=str)
@pytest.mark.parametrize("out", ["fresh", "given", "x"])
def test_empty(backend: str, device: torch.device, shape: Shape, out: str, kept: torch.dtype | None) -> None:
    judge(Case(shape, out=out, kept=kept, gate="row"), device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", [*MODULATORS, None])
@pytest.mark.parametrize("shape", [Shape(2, 4, 9, 37), Shape(2, 3, 1, 16), Shape(2, 1, 6, 16)], ids=str)
def test_gates(
    backend: str, device: torch.device, dtype: torch.dtype, gate: str | None, shape: Shape
) -> None:
    judge(Case(shape, dtype, gate=gate, seed=1), device)


@pytest.mark.parametrize("strides", [(), (1,), (2,), (1, 2, 4), (4, 1), (1, 2, 3, 4, 1, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("gate", ["row", "token"])
@pytest.mark.parametrize("kept", [None, FLOAT8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides(
    backend: str,
    device: torch.device,
    strides: tuple[int, ...],
    gate: str,
    kept: torch.dtype | None,
    dtype: torch.dtype,
) -> None:
    judge(
        Case(Shape(2, 5, 7, 24), dtype, strides=strides, gate=gate, metric="cosine", kept=kept, seed=2),
        device,
    )


@pytest.mark.parametrize("layout", READ_LAYOUTS)
@pytest.mark.parametrize("out", ["fresh", "given", "x"])
@pytest.mark.parametrize("kept", [None, FLOAT8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(
    backend: str, device: torch.device, layout: str, out: str, kept: torch.dtype | None, dtype: torch.dtype
) -> None:
    judge(Case(dtype=dtype, layouts=(layout,), out=out, kept=kept, strides=(1, 2), seed=3), device)


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
        judge(Case(dtype=dtype, x_total=x_total, kept_total=kept_total, kept=kept, seed=4), device)


@pytest.mark.parametrize("metric", ["l1", "cosine"])
def test_videos_of_uneven_size(backend: str, device: torch.device, metric: str) -> None:
    """Video 1 has three rows, video 3 has one, the others have none."""
    judge(Case(Shape(4, 3, 5, 33), videos=(1, 3, 1, 1), num_videos=5, metric=metric), device)


def test_interleaved_rows_of_a_video(backend: str, device: torch.device) -> None:
    judge(Case(Shape(4, 2, 3, 16), torch.bfloat16, videos=(0, 1, 0, 1), num_videos=2), device)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kept", [None, FLOAT8])
def test_unusual_values(
    backend: str, device: torch.device, values: str, dtype: torch.dtype, kept: torch.dtype | None
) -> None:
    judge(Case(dtype=dtype, values=values, kept=kept, metric="l2", seed=5), device)


@pytest.mark.parametrize("kept", [torch.float32, FLOAT8])
def test_uninitialized_cache(backend: str, device: torch.device, kept: torch.dtype) -> None:
    """In a first step the cache is uninitialized. The new residual and the sums of the new residual are
    valid."""
    generator = torch.Generator().manual_seed(6)
    x, y = (random_tensor(generator, 2, 12, 20, dtype=torch.float32, device=device) for _ in range(2))
    results = []
    for poison in (0.0, torch.nan):
        residual = torch.full((2, 12, 20), poison, device=device).to(kept)
        scale = torch.full((2, 12), poison, device=device) if kept == FLOAT8 else None
        x_out, sums = gated_residual_meter(x, y, None, residual, frames=3, residual_scale=scale)
        results.append((x_out, residual, sums[:, 2], sums[:, 7:], *([] if scale is None else [scale])))
        assert sums[:, 2].isfinite().all()
    assert sums[:, :2].isnan().all()
    assert all(same_bits(one, two) for one, two in zip(*results, strict=True))


@pytest.mark.parametrize("op", ["gated_residual_meter", "gated_residual_norm_meter", "stack_residual_meter"])
def test_zero_channels_leave_scales_unchanged(backend: str, device: torch.device, op: str) -> None:
    """With C = 0 the scales of a float8 cache do not change."""
    call = good_call(op, device, float8=True)
    for name, value in call.items():
        if isinstance(value, torch.Tensor) and value.dim() == 3:
            call[name] = value[:, :, :0]
        elif name in ("weight", "bias"):
            call[name] = value[:0]
    before = call["residual_scale"].clone()
    *_, sums = run(op, call)
    assert same_bits(call["residual_scale"], before)
    assert (sums == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["y", "old"])
def test_nonfinite_input_affects_only_its_video(
    backend: str, device: torch.device, value: float, where: str
) -> None:
    generator = torch.Generator().manual_seed(6)
    x, y, old = (random_tensor(generator, 2, 12, 20, dtype=torch.float32, device=device) for _ in range(3))
    gate = torch.ones(2, 1, 20, device=device)
    (y if where == "y" else old)[1, 7, 3] = value
    _, sums = gated_residual_meter(
        x, y, gate, old, frames=3, video_of_row=video_ids([0, 1], device), num_videos=2, metric="l2"
    )
    columns = adacache_kernels.sum_columns((1,))
    assert sums[0].isfinite().all()
    touched = {"abs_diff", "sq_diff", "dot"}
    touched |= (
        {"abs_new", "sq_new", "motion_diff_1", "motion_sum_1"} if where == "y" else {"abs_old", "sq_old"}
    )
    for column, total in zip(columns, sums[1].tolist(), strict=True):
        assert torch.isfinite(torch.tensor(total)).item() == (column not in touched), column

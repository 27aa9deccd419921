# SPDX-License-Identifier: Apache-2.0
"""residual_meter: sums against float64 over shapes, layouts, videos and unusual values, and against the fused
op."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from judge import JUDGES, VALUES, Case
from op_cases import DTYPES, EMPTY_SHAPES, READ_LAYOUTS, SHAPES, Shape, random_tensor, video_ids

from adacache_kernels import gated_residual_meter, residual_meter

judge = JUDGES["residual_meter"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES + EMPTY_SHAPES, ids=str)
@pytest.mark.parametrize("metric", ["l1", "l2", "cosine"])
def test_shapes(backend: str, device: torch.device, shape: Shape, dtype: torch.dtype, metric: str) -> None:
    judge(Case(shape, dtype, metric=metric), device)


@pytest.mark.parametrize("layout", READ_LAYOUTS)
@pytest.mark.parametrize("strides", [(), (2, 1), (1, 2, 3, 4, 1, 2, 3, 4)], ids=str)
def test_layouts_and_strides(
    backend: str, device: torch.device, layout: str, strides: tuple[int, ...]
) -> None:
    shape = Shape(2, 5, 6, 40)
    judge(Case(shape, layouts=(layout, "contiguous"), strides=strides, seed=1), device)
    judge(Case(shape, torch.bfloat16, layouts=("contiguous", layout), strides=strides, seed=2), device)


def test_videos_of_uneven_size(backend: str, device: torch.device) -> None:
    judge(Case(Shape(4, 3, 5, 33), videos=(1, 3, 1, 1), num_videos=5, metric="l2"), device)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_unusual_values(backend: str, device: torch.device, values: str, dtype: torch.dtype) -> None:
    judge(Case(dtype=dtype, values=values, metric="l2", seed=3), device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_the_fused_op(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Both measure the rounded residual."""
    generator = torch.Generator().manual_seed(4)
    x, y, old = (random_tensor(generator, 2, 12, 40, dtype=dtype, device=device) for _ in range(3))
    gate = random_tensor(generator, 2, 3, 40, dtype=dtype, device=device)
    residual = old.clone()
    options: dict[str, Any] = {"frames": 3, "strides": (1, 2), "metric": "l2"}
    _, fused = gated_residual_meter(x, y, gate, residual, **options)
    alone = residual_meter(residual, old, **options)
    torch.testing.assert_close(alone, fused, rtol=1e-6, atol=1e-5)


def test_non_finite_input(backend: str, device: torch.device) -> None:
    new, old = (torch.randn(2, 6, 8, device=device) for _ in range(2))
    new[0, 0, 0] = torch.nan
    sums = residual_meter(new, old, frames=3, video_of_row=video_ids([0, 1], device), num_videos=2)
    assert sums[0, [0, 2, 7, 8]].isnan().all()
    assert sums[1, [0, 1, 2, 7, 8]].isfinite().all()

# SPDX-License-Identifier: Apache-2.0
"""The store: differences beyond the range of the dtype saturate, and non-finite values stay non-finite."""

from __future__ import annotations

import math

import pytest
import torch
from adacache.policies.base import Keep
from adacache.rows import Split
from adacache.runtime.store import Store

KEY = (0, "site", 0, "")
MOST = 65504.0


def streams(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    before = torch.full((2, 3, 8), 30000.0, dtype=dtype)
    after = torch.full((2, 3, 8), -40064.0, dtype=dtype)
    after[0, 0, 0], after[0, 0, 1] = 30001.0, math.nan
    return before, after


@pytest.mark.parametrize(
    ("stream", "kept"),
    [
        (torch.float16, None),
        (torch.float16, torch.float16),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float16),
    ],
)
@pytest.mark.parametrize("rows", [None, [True, False]])
def test_difference_beyond_float16_saturates(
    stream: torch.dtype, kept: torch.dtype | None, rows: list[bool] | None
) -> None:
    store, (before, after) = Store(), streams(stream)
    split = None if rows is None else Split(rows, before.device)
    part = after if rows is None else after[:1]
    store.keep_difference(KEY, part, before, Keep(dtype=kept), split, [1, 1])
    residual = store.get(KEY)
    assert residual is not None
    assert residual.factors[0].dtype == torch.float16
    values = residual.factors[0][0].flatten()
    assert math.isnan(values[1])
    assert values[2:].tolist() == [-MOST] * 22
    x = store.apply(KEY, torch.zeros_like(before))
    assert x[0, 0, 2:].isfinite().all()


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_wider_dtypes_do_not_saturate(kept: torch.dtype) -> None:
    store, (before, after) = Store(), streams(torch.float16)
    store.keep_difference(KEY, after, before, Keep(dtype=kept), None, [1, 1])
    result = store.apply(KEY, before)
    assert result[0, 0, 2:].tolist() == pytest.approx([-40064.0] * 6, rel=0.01)

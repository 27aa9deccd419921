# SPDX-License-Identifier: Apache-2.0
"""Every op on random supported inputs against NumPy; `decide` against a plain Python implementation.

ADACACHE_PROPERTY_SEED selects another sequence of cases. Hypothesis shrinks and prints a failing case.
"""

from __future__ import annotations

import os
import random

import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from judge import FLOAT8, JUDGES, MODULATORS, VALUES, Case
from op_calls import parameters
from op_cases import DTYPES, READ_LAYOUTS, Shape
from test_decide import judge_request, judge_videos

from adacache_kernels._choices import NORMS, ROUNDINGS

SEED = int(os.environ.get("ADACACHE_PROPERTY_SEED", "0"))
CHANNELS = st.one_of(st.sampled_from([1, 8, 16, 17, 32, 64, 96, 128]), st.integers(1, 150))
ANY_MODULATOR = st.sampled_from([None, *MODULATORS])


@st.composite
def cases(draw: st.DrawFn, op: str) -> Case:
    """Supported cases of `op`, the simplest first."""
    has = set(parameters(op))
    shape = Shape(draw(st.integers(1, 4)), draw(st.integers(1, 6)), draw(st.integers(1, 7)), draw(CHANNELS))
    choice: dict[str, object] = {
        "shape": shape,
        "dtype": draw(st.sampled_from(DTYPES)),
        "seed": draw(st.integers(0, 2**32 - 1)),
        "layouts": tuple(draw(st.lists(st.sampled_from(READ_LAYOUTS), min_size=1, max_size=5))),
        "values": draw(st.sampled_from(VALUES)),
    }
    for name in ("gate", "shift", "scale"):
        if name in has:
            choice[name] = draw(ANY_MODULATOR)
    widening = sorted(has & {"gate", "shift", "scale", "weight", "bias"})
    if widening:
        choice["wide"] = tuple(draw(st.sets(st.sampled_from(widening))))
        choice["tables"] = tuple(draw(st.sets(st.sampled_from(widening))) - {"weight", "bias"})
    if "rounding" in has:
        choice["rounding"] = draw(st.sampled_from(list(ROUNDINGS)))
    if "norm" in has:
        choice["norm"] = draw(st.sampled_from(list(NORMS)))
    if "weight" in has:
        choice |= {"weight": draw(st.booleans()), "bias": draw(st.booleans())}
        choice["eps"] = draw(st.sampled_from([1e-6, 1e-5, 1e-3]))
    if "frames" in has:
        choice["strides"] = tuple(draw(st.lists(st.integers(1, 5), max_size=8)))
        choice["metric"] = draw(st.sampled_from(["l1", "l2", "cosine"]))
    if "video_of_row" in has:
        if draw(st.booleans()):
            num_videos = draw(st.integers(1, 3))
            videos = st.lists(st.integers(0, num_videos - 1), min_size=shape.rows, max_size=shape.rows)
            choice["videos"] = tuple(draw(videos))
        else:  # one video for all rows, or, for ops without a meter, one video per row
            num_videos = 1 if "frames" in has else draw(st.sampled_from([1, shape.rows]))
        choice["num_videos"] = num_videos
    if op == "reuse_residual":
        choice["kept"] = draw(st.sampled_from([None, *DTYPES, FLOAT8]))
        reuse = st.lists(st.booleans(), min_size=num_videos, max_size=num_videos).map(tuple)
        choice["reuse"] = draw(st.none() | reuse)
    elif op.startswith("extrapolate_residual"):
        choice |= {"kept": draw(st.sampled_from([None, *DTYPES])), "factors": draw(st.integers(1, 4))}
        choice["compare"] = draw(st.sampled_from(["forecast", "computed"]))
    elif "residual_scale" in has:
        choice["kept"] = draw(st.sampled_from([None, FLOAT8]))
    if "x_rows" in has:
        choice["x_total"] = draw(st.none() | st.integers(1, 5))
    if has & {"residual_rows", "rows"}:
        choice["kept_total"] = draw(st.none() | st.integers(shape.rows, shape.rows + 3))
    if has & {"out", "norm_out"}:
        choice["out"] = draw(st.sampled_from(["fresh", "given", "x"]))
    return Case(**choice)  # type: ignore[arg-type]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("op", JUDGES)
def test_op(backend: str, device: torch.device, op: str) -> None:
    tried = 0

    @seed(SEED)
    @given(cases(op))
    def judge(case: Case) -> None:
        nonlocal tried
        tried += 1
        JUDGES[op](case, device)

    print(f"seed {SEED}")
    judge()
    print(f"{op}: {tried} cases")
    assert tried >= settings().max_examples


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("metric", ["l1", "l2", "cosine"])
@pytest.mark.parametrize("rule", ["published", "paper"])
def test_decide(backend: str, device: torch.device, rule: str, metric: str) -> None:
    tried = 0

    @seed(SEED)
    @settings(max_examples=settings().max_examples // 6 + 1)
    @given(st.integers(0, 2**32 - 1))
    def judge(number: int) -> None:
        nonlocal tried
        tried += 1
        judge_request(random.Random(number), rule, metric, device, 8)
        judge_videos(random.Random(number), rule, metric, device, 4)

    print(f"seed {SEED}")
    judge()
    assert tried >= settings().max_examples // 6

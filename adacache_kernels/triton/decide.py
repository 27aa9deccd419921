# SPDX-License-Identifier: Apache-2.0
"""The decision rule; see `ops/decide.py` for the terms."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..columns import METRICS, RULES
from .launch import on_device

_L1 = tl.constexpr(METRICS["l1"])
_L2 = tl.constexpr(METRICS["l2"])


# Triton passes floats as float32. Constants of a policy are constexpr; `elements` is passed as its bits,
# because a constexpr would recompile for each video size.
@triton.jit(
    do_not_specialize=[
        "step",
        "site",
        "frames",
        "elements_bits",
        "num_videos",
        "sum_columns",
        "state_columns",
        "entries",
    ]
)
def decide_kernel(
    sums,
    state,
    thresholds,
    rates,
    num_videos,
    sum_columns,
    state_columns,
    entries,
    step,
    site,
    frames,
    elements_bits,
    FIRST: tl.constexpr,  # step 1: no old residual
    FORCED: tl.constexpr,  # all videos compute in this step
    INSIDE: tl.constexpr,  # the step is in the window of motion regularization
    STRIDES: tl.constexpr,
    METRIC: tl.constexpr,
    PUBLISHED: tl.constexpr,
    SCALE: tl.constexpr,
    POWER: tl.constexpr,
    DIVISOR: tl.constexpr,
    GRADIENT_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    video = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = video < num_videos
    elements = elements_bits.to(tl.float64, bitcast=True)
    state += video * state_columns
    sums += video * sum_columns
    was_step = tl.load(state + 0, mask=mask, other=0.0)
    rate = tl.load(state + 1, mask=mask, other=0.0)
    next_step = tl.load(state + 2, mask=mask, other=0.0)
    gap = tl.load(state + 3, mask=mask, other=0.0)
    count = tl.load(state + 4, mask=mask, other=0.0)
    mean = tl.load(state + 5, mask=mask, other=0.0)
    nonfinite = tl.load(state + 9, mask=mask, other=0.0)
    previous = tl.load(state + 10 + site, mask=mask, other=0.0)

    now = tl.full([BLOCK], 0.0, tl.float64) + step.to(tl.float64)
    further = was_step == now
    if not FORCED:
        mask = mask & ((next_step == now) | further)
    gap = tl.where(further, gap, rate if PUBLISHED else now - was_step)
    count = tl.where(further, count, 0.0)
    mean = tl.where(further, mean, 0.0)
    nonfinite = tl.where(further, nonfinite, 0.0)

    if FIRST:
        rate = tl.full([BLOCK], 1.0, tl.float64)
    else:
        if METRIC == _L1:
            magnitude = (
                tl.load(sums + 1, mask=mask, other=1.0)
                if PUBLISHED
                else tl.full([BLOCK], elements, tl.float64)
            )
            distance = tl.load(sums + 0, mask=mask, other=0.0) / magnitude
        elif METRIC == _L2:
            magnitude = (
                tl.load(sums + 4, mask=mask, other=1.0)
                if PUBLISHED
                else tl.full([BLOCK], elements, tl.float64)
            )
            distance = tl.sqrt(tl.load(sums + 3, mask=mask, other=0.0) / magnitude)
        else:
            squares = tl.load(sums + 4, mask=mask, other=1.0) * tl.load(sums + 5, mask=mask, other=1.0)
            distance = 1.0 - tl.load(sums + 6, mask=mask, other=0.0) / tl.sqrt(squares)
        motion = tl.full([BLOCK], 0.0 if len(STRIDES) > 0 else float("nan"), tl.float64)
        for index in tl.static_range(len(STRIDES)):
            difference = tl.load(sums + 7 + 2 * index, mask=mask, other=0.0)
            if PUBLISHED:
                pairs = tl.load(sums + 8 + 2 * index, mask=mask, other=1.0)
            else:
                pairs = tl.full([BLOCK], elements, tl.float64) * (frames - STRIDES[index]).to(tl.float64)
                pairs = pairs / frames.to(tl.float64)
            motion += difference / pairs
        if len(STRIDES) > 1:
            motion = motion / len(STRIDES)

        mean = (distance / gap + count * mean) / (count + 1.0)
        factor = tl.full([BLOCK], 1.0, tl.float64)
        now_previous = previous
        if SCALE > 0 and PUBLISHED:
            now_previous = factor
            if INSIDE:
                raised = factor if POWER == 0 else tl.exp(POWER * tl.log(motion / SCALE))
                now_previous = raised / DIVISOR
            factor = now_previous + tl.abs(GRADIENT_WEIGHT * (now_previous - previous) / gap)
        elif SCALE > 0 and INSIDE:
            gradient = tl.where(previous == previous, GRADIENT_WEIGHT * (motion - previous) / gap, 0.0)
            factor = (motion + gradient) / SCALE
            now_previous = motion
        score = mean * factor

        rate = tl.load(rates + entries - 1 + video * 0, mask=mask, other=1.0)
        for passed in range(1, entries):
            entry = entries - 1 - passed
            rate = tl.where(score < tl.load(thresholds + entry), tl.load(rates + entry), rate)
        bad = score - score != 0.0
        rate = tl.where(bad, 1.0, rate)
        count += 1.0
        tl.store(state + 6, distance, mask=mask)
        tl.store(state + 7, motion, mask=mask)
        tl.store(state + 8, tl.where(bad, 1.0, factor), mask=mask)
        tl.store(state + 10 + site, tl.where(bad, previous, now_previous), mask=mask)
        # The mean stays NaN, so that later sites of this step decide the same.
        mean = tl.where(bad, float("nan"), mean)
        nonfinite = tl.where(bad, 1.0, nonfinite)

    tl.store(state + 0, now, mask=mask)
    tl.store(state + 1, rate, mask=mask)
    tl.store(state + 2, now + rate, mask=mask)
    tl.store(state + 3, gap, mask=mask)
    tl.store(state + 4, count, mask=mask)
    tl.store(state + 5, mean, mask=mask)
    tl.store(state + 9, nonfinite, mask=mask)


def decide(
    sums: torch.Tensor,
    state: torch.Tensor,
    thresholds: torch.Tensor,
    rates: torch.Tensor,
    step: int,
    num_steps: int,
    site: int,
    frames: int,
    strides: Sequence[int],
    metric: int,
    rule: int,
    elements: float,
    first_step: int,
    last_step: int,
    scale: float,
    power: float,
    divisor: float,
    gradient_weight: float,
) -> None:
    """Launch."""
    num_videos = state.shape[0]
    if num_videos == 0:
        return
    block = min(triton.next_power_of_2(num_videos), 128)
    with on_device(state):
        decide_kernel[(triton.cdiv(num_videos, block),)](
            sums,
            state,
            thresholds,
            rates,
            num_videos,
            sums.shape[1],
            state.shape[1],
            thresholds.shape[0],
            step,
            site,
            frames,
            *struct.unpack("<q", struct.pack("<d", elements or 1.0)),
            FIRST=step == 1,
            FORCED=step == 1 or step >= num_steps - 1,
            INSIDE=first_step <= step <= last_step,
            STRIDES=tuple(strides),
            METRIC=metric,
            PUBLISHED=rule == RULES["published"],
            SCALE=float(scale),
            POWER=float(power),
            DIVISOR=float(divisor),
            GRADIENT_WEIGHT=float(gradient_weight),
            BLOCK=block,
            num_warps=1,
            enable_fp_fusion=False,
        )

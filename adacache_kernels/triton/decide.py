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
        "thresholds_stride",
        "rates_stride",
        "num_steps",
        "first_step",
        "last_step",
    ]
)
def decide_kernel(
    sums,
    state,
    thresholds,
    rates,
    step_of_video,
    num_steps_of_video,
    window_of_video,
    num_videos,
    sum_columns,
    state_columns,
    entries,
    thresholds_stride,
    rates_stride,
    step,
    num_steps,
    first_step,
    last_step,
    site,
    frames,
    elements_bits,
    # Steps or schedules differ per video: the next three are computed here. Otherwise they are constants.
    BY_VIDEO: tl.constexpr,
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

    zero = tl.full([BLOCK], 0.0, tl.float64)
    now = zero + step.to(tl.float64)
    if step_of_video is not None:
        now = tl.load(step_of_video + video, mask=mask, other=1).to(tl.float64)
    first = now == 1.0
    inside = first
    further = was_step == now
    if BY_VIDEO:
        last = zero + num_steps.to(tl.float64)
        if num_steps_of_video is not None:
            last = tl.load(num_steps_of_video + video, mask=mask, other=1).to(tl.float64)
        window_start, window_end = zero + first_step.to(tl.float64), zero + last_step.to(tl.float64)
        if window_of_video is not None:
            window_start = tl.load(window_of_video + 2 * video, mask=mask, other=1).to(tl.float64)
            window_end = tl.load(window_of_video + 2 * video + 1, mask=mask, other=0).to(tl.float64)
        inside = (window_start <= now) & (now <= window_end)
        mask = mask & (first | (now >= last - 1.0) | (next_step == now) | further)
    elif not FORCED:
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

        mean_before = mean
        mean = (distance / gap + count * mean) / (count + 1.0)
        factor = tl.full([BLOCK], 1.0, tl.float64)
        now_previous = previous
        if SCALE > 0 and PUBLISHED:
            now_previous = factor
            if INSIDE or BY_VIDEO:
                raised = factor if POWER == 0 else tl.exp(POWER * tl.log(motion / SCALE))
                now_previous = raised / DIVISOR
            if BY_VIDEO:
                now_previous = tl.where(inside, now_previous, factor)
            factor = now_previous + tl.abs(GRADIENT_WEIGHT * (now_previous - previous) / gap)
        elif SCALE > 0 and (INSIDE or BY_VIDEO):
            gradient = tl.where(previous == previous, GRADIENT_WEIGHT * (motion - previous) / gap, 0.0)
            now_previous = motion
            if BY_VIDEO:
                factor = tl.where(inside, (motion + gradient) / SCALE, factor)
                now_previous = tl.where(inside, motion, previous)
            else:
                factor = (motion + gradient) / SCALE
        score = mean * factor

        thresholds += video * thresholds_stride
        rates += video * rates_stride
        rate = tl.load(rates + entries - 1, mask=mask, other=1.0)
        for passed in range(1, entries):
            entry = entries - 1 - passed
            below = score < tl.load(thresholds + entry, mask=mask, other=0.0)
            rate = tl.where(below, tl.load(rates + entry, mask=mask, other=1.0), rate)
        bad = (score - score != 0.0) | (distance - distance != 0.0)
        if SCALE > 0 and (INSIDE or BY_VIDEO):  # a negative power turns an infinite motion into the factor 0
            unusable = motion - motion != 0.0
            if BY_VIDEO:
                unusable = unusable & inside
            bad = bad | unusable
        rate = tl.where(bad, 1.0, rate)
        # The mean stays NaN, so that later sites of this step decide the same.
        decided_mean = tl.where(bad, float("nan"), mean)
        decided_nonfinite = tl.where(bad, 1.0, nonfinite)
        measured = mask
        if BY_VIDEO:
            measured = mask & ~first
            rate = tl.where(first, 1.0, rate)
            mean = tl.where(first, mean_before, decided_mean)
            count = tl.where(first, count, count + 1.0)
            nonfinite = tl.where(first, nonfinite, decided_nonfinite)
        else:
            mean = decided_mean
            count += 1.0
            nonfinite = decided_nonfinite
        tl.store(state + 6, distance, mask=measured)
        tl.store(state + 7, motion, mask=measured)
        tl.store(state + 8, tl.where(bad, 1.0, factor), mask=measured)
        tl.store(state + 10 + site, tl.where(bad, previous, now_previous), mask=measured)

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
    step_of_video: torch.Tensor | None,
    num_steps_of_video: torch.Tensor | None,
    window_of_video: torch.Tensor | None,
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
    by_video = not (step_of_video is num_steps_of_video is window_of_video is None)
    block = min(triton.next_power_of_2(num_videos), 128)
    with on_device(state):
        decide_kernel[(triton.cdiv(num_videos, block),)](
            sums,
            state,
            thresholds,
            rates,
            step_of_video,
            num_steps_of_video,
            window_of_video,
            num_videos,
            sums.shape[1],
            state.shape[1],
            thresholds.shape[-1],
            thresholds.shape[1] if thresholds.dim() == 2 else 0,
            rates.shape[1] if rates.dim() == 2 else 0,
            step,
            num_steps,
            first_step,
            last_step,
            site,
            frames,
            *struct.unpack("<q", struct.pack("<d", elements or 1.0)),
            BY_VIDEO=by_video,
            FIRST=not by_video and step == 1,
            FORCED=not by_video and (step == 1 or step >= num_steps - 1),
            INSIDE=not by_video and first_step <= step <= last_step,
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

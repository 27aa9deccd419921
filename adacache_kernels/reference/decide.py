# SPDX-License-Identifier: Apache-2.0
"""The decision rule; see `ops/decide.py` for the terms. All values are tensors over videos, so that nothing
synchronizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..columns import METRICS, RULES


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
    published = rule == RULES["published"]
    was_step, rate, next_step, gap, count, mean, distance, motion, factor, nonfinite = state[:, :10].unbind(1)
    previous = state[:, 10 + site]
    now = _by_video(step, step_of_video, was_step)
    last = _by_video(num_steps, num_steps_of_video, was_step)
    edges = (None, None) if window_of_video is None else window_of_video.unbind(1)
    window = [_by_video(*edge, was_step) for edge in zip((first_step, last_step), edges, strict=True)]

    first_site = was_step != now
    due = (next_step == now) | ~first_site | (now == 1) | (now >= last - 1)
    # The divisor of the distance: the previous rate (published) or the elapsed steps (paper).
    gap = torch.where(first_site, rate if published else now - was_step, gap)
    count = torch.where(first_site, 0.0, count)
    mean = torch.where(first_site, 0.0, mean)
    nonfinite = torch.where(first_site, 0.0, nonfinite)
    one = torch.ones_like(rate)
    first = now == 1  # no old residual
    _store(
        state,
        site,
        due & first,
        (now, one, one + 1, gap, count, mean, distance, motion, factor, nonfinite, previous),
    )

    distance = _distance(sums, metric, published, elements)
    motion = _motion(sums, strides, frames, published, elements)
    mean = (distance / gap + count * mean) / (count + 1)
    factor = torch.ones_like(mean)
    now_previous = previous
    inside = (window[0] <= now) & (now <= window[1])
    if scale > 0 and published:
        now_previous = torch.where(inside, (motion / scale).pow(power) / divisor, factor)
        factor = now_previous + (gradient_weight * (now_previous - previous) / gap).abs()
    elif scale > 0:
        gradient = torch.where(previous.isnan(), 0.0, gradient_weight * (motion - previous) / gap)
        factor = torch.where(inside, (motion + gradient) / scale, factor)
        now_previous = torch.where(inside, motion, previous)
    score = mean * factor

    below = score[:, None] < thresholds
    entry = torch.where(below.any(1), below.int().argmax(1), thresholds.shape[-1] - 1)
    chosen = rates[entry] if rates.dim() == 1 else rates.gather(1, entry[:, None])[:, 0]
    # After a non-finite measurement or score the next step is computed. The mean stays NaN, so that later
    # sites of this step decide the same. A negative power turns an infinite motion into the factor 0.
    bad = ~(score.isfinite() & distance.isfinite())
    if scale > 0:
        bad = bad | (inside & ~motion.isfinite())
    rate = torch.where(bad, 1.0, chosen)
    mean = torch.where(bad, torch.nan, mean)
    factor = torch.where(bad, 1.0, factor)
    nonfinite = torch.where(bad, 1.0, nonfinite)
    now_previous = torch.where(bad, previous, now_previous)
    _store(
        state,
        site,
        due & ~first,
        (now, rate, now + rate, gap, count + 1, mean, distance, motion, factor, nonfinite, now_previous),
    )


def _by_video(value: int, of_video: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return torch.full_like(like, value) if of_video is None else of_video.to(like.dtype)


def _distance(sums: torch.Tensor, metric: int, published: bool, elements: float) -> torch.Tensor:
    abs_diff, abs_old, _, sq_diff, sq_old, sq_new, dot = sums[:, :7].unbind(1)
    if metric == METRICS["l1"]:
        return abs_diff / (abs_old if published else elements)
    if metric == METRICS["l2"]:
        return (sq_diff / (sq_old if published else elements)).sqrt()
    return 1 - dot / (sq_old * sq_new).sqrt()


def _motion(
    sums: torch.Tensor, strides: Sequence[int], frames: int, published: bool, elements: float
) -> torch.Tensor:
    if not strides:
        return torch.full_like(sums[:, 0], torch.nan)
    by_stride = []
    for index, stride in enumerate(strides):
        difference, magnitude = sums[:, 7 + 2 * index], sums[:, 8 + 2 * index]
        by_stride.append(difference / (magnitude if published else elements * (frames - stride) / frames))
    return torch.stack(by_stride).mean(0)


def _store(state: torch.Tensor, site: int, due: torch.Tensor, values: tuple[torch.Tensor, ...]) -> None:
    *common, previous = values
    new = state.clone()
    new[:, :10] = torch.stack(common, 1)
    new[:, 10 + site] = previous
    state.copy_(torch.where(due[:, None], new, state))

# SPDX-License-Identifier: Apache-2.0
"""The functions of `_engine` in plain NumPy, for a Python that the compiled module does not fit. Slower."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
import numpy.typing

from .columns import METRICS, RULES

Doubles = numpy.typing.NDArray[numpy.float64]
Integers = numpy.typing.NDArray[numpy.integer[Any]]

_LAST, _RATE, _NEXT, _GAP, _COUNT, _MEAN, _DISTANCE, _MOTION, _FACTOR, _NONFINITE = range(10)
_FIRST_FACTOR = 10
_MAX_STRIDES = 8


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _shape(array: Any) -> str:
    return f"[{', '.join(map(str, array.shape))}]"


def _doubles(values: Any) -> Doubles:
    return numpy.ascontiguousarray(values, dtype=numpy.float64)


def _check_codebooks(thresholds: Doubles, rates: Doubles) -> None:
    """thresholds, rates: [codebooks, entries]."""
    ascending = ~numpy.isnan(thresholds)
    # A shorter codebook is padded with its last entry.
    repeated = (thresholds[:, 1:] == thresholds[:, :-1]) & (rates[:, 1:] == rates[:, :-1])
    ascending[:, 1:] &= (thresholds[:, 1:] > thresholds[:, :-1]) | repeated
    whole = (rates >= 1) & (rates == numpy.floor(rates)) & (rates < 2**31)
    for name, expected, good, values in (
        ("thresholds", "ascending numbers", ascending, thresholds),
        ("rates", "integers >= 1", whole, rates),
    ):
        for book, entry in numpy.argwhere(~good):
            place = f"at entry {entry} of codebook {book}"
            raise ValueError(f"{name}: expected {expected}, got {values[book, entry]:g} {place}")


def initial_state(num_videos: int, sites: int, rule: int = 0) -> Doubles:
    _require(num_videos >= 1, f"num_videos: expected at least 1, got {num_videos}")
    _require(sites >= 1, f"sites: expected at least 1, got {sites}")
    _check_rule(rule)
    state = numpy.zeros((num_videos, _FIRST_FACTOR + sites))
    state[:, [_RATE, _NEXT, _GAP, _FACTOR]] = 1
    state[:, [_DISTANCE, _MOTION]] = numpy.nan
    state[:, _FIRST_FACTOR:] = 1 if rule == RULES["published"] else numpy.nan
    return state


def decide(
    sums: numpy.typing.ArrayLike,
    state: Doubles,
    thresholds: numpy.typing.ArrayLike,
    rates: numpy.typing.ArrayLike,
    step: int | Integers,
    num_steps: int | Integers,
    site: int,
    frames: int,
    strides: Sequence[int],
    metric: int,
    rule: int,
    elements: float,
    first_step: int | Integers,
    last_step: int | Integers,
    scale: float,
    power: float,
    divisor: float,
    gradient_weight: float,
) -> None:
    sums, thresholds, rates = _doubles(sums), _doubles(thresholds), _doubles(rates)
    _check_rule(rule)
    _require(0 <= metric <= 2, f"metric: expected 0 (l1), 1 (l2) or 2 (cosine), got {metric}")
    most = f"strides: expected at most {_MAX_STRIDES}, got {len(strides)}"
    _require(len(strides) <= _MAX_STRIDES, most)
    for stride in strides:
        inside = f"strides: expected each from 1 to frames - 1 = {frames - 1}, got {stride}"
        _require(1 <= stride < frames, inside)
    columns = 7 + 2 * len(strides)
    _require(
        sums.ndim == 2 and sums.shape[1] == columns,
        f"sums: expected [num_videos, {columns}] for {len(strides)} strides, got {_shape(sums)}",
    )
    videos = sums.shape[0]
    _require(
        state.ndim == 2 and state.shape[0] == videos and state.shape[1] > _FIRST_FACTOR,
        f"state: expected [num_videos, {_FIRST_FACTOR} + sites] = [{videos}, more than {_FIRST_FACTOR}], got "
        f"{_shape(state)}",
    )
    _require(
        state.dtype == numpy.float64 and state.flags.c_contiguous and state.flags.writeable,
        "state: expected a writeable, contiguous float64 array",
    )
    by_video = thresholds.ndim == 2 and thresholds.shape[0] == videos
    _require(
        (thresholds.ndim == 1 or by_video) and thresholds.shape[-1] >= 1,
        "thresholds: expected [entries] or [num_videos, entries] with at least one entry, got "
        f"{_shape(thresholds)}",
    )
    _require(
        rates.shape == thresholds.shape,
        f"rates: expected {_shape(thresholds)} like thresholds, got {_shape(rates)}",
    )
    num_steps = _integers("num_steps", num_steps, videos)
    step = _integers("step", step, videos)
    window = _integers("first_step", first_step, videos), _integers("last_step", last_step, videos)
    for now, last in zip(step.tolist(), num_steps.tolist(), strict=True):
        _require(last >= 1, f"num_steps: expected at least 1, got {last}")
        _require(1 <= now <= last, f"step: expected 1 to num_steps = {last}, got {now}")
    last_site = state.shape[1] - _FIRST_FACTOR - 1
    _require(0 <= site <= last_site, f"site: expected 0 to {last_site}, got {site}")
    thresholds, rates = numpy.atleast_2d(thresholds), numpy.atleast_2d(rates)
    _check_codebooks(thresholds, rates)
    published = rule == RULES["published"]
    with numpy.errstate(all="ignore"):
        distance = _distance(sums, metric, published, elements)
        motion = _motion(sums, strides, frames, published, elements)
    _choose(
        state,
        _due(state, step, num_steps),
        thresholds,
        rates,
        published,
        window,
        (scale, power, divisor, gradient_weight),
        step,
        site,
        distance,
        motion,
    )


def simulate(
    distances: numpy.typing.ArrayLike,
    motion: numpy.typing.ArrayLike,
    thresholds: numpy.typing.ArrayLike,
    rates: numpy.typing.ArrayLike,
    rule: int = 0,
    motion_on: bool = False,
    first_step: int = 1,
    last_step: int | None = None,
    scale: float = 0.385,
    power: float = 8.0,
    divisor: float = 1.0,
    gradient_weight: float = 10.0,
) -> tuple[numpy.typing.NDArray[numpy.bool_], numpy.typing.NDArray[numpy.int32]]:
    distances, motion = _doubles(distances), _doubles(motion)
    thresholds, rates = _doubles(thresholds), _doubles(rates)
    _require(
        distances.ndim == 3 and distances.shape[1] == distances.shape[2] and distances.shape[1] >= 1,
        f"distances: expected [num_videos, num_steps, num_steps], got {_shape(distances)}",
    )
    videos, steps = distances.shape[:2]
    _require(
        motion.shape == (videos, steps),
        f"motion: expected [num_videos, num_steps] = [{videos}, {steps}], got {_shape(motion)}",
    )
    _require(
        thresholds.ndim == 2 and thresholds.shape[1] >= 1,
        f"thresholds: expected [codebooks, entries], got {_shape(thresholds)}",
    )
    books, entries = thresholds.shape
    _require(
        rates.shape == thresholds.shape,
        f"rates: expected [codebooks, entries] = [{books}, {entries}] like thresholds, got {_shape(rates)}",
    )
    _check_codebooks(thresholds, rates)
    _require(not motion_on or scale > 0, f"scale: expected more than 0, got {scale:g}")
    _check_rule(rule)
    window = (numpy.asarray(first_step), numpy.asarray(steps if last_step is None else last_step))
    regularization = (scale if motion_on else 0.0, power, divisor, gradient_weight)
    # One row per codebook and video.
    state = numpy.tile(initial_state(1, 1, rule), (books * videos, 1))
    thresholds, rates = numpy.repeat(thresholds, videos, 0), numpy.repeat(rates, videos, 0)
    video = numpy.tile(numpy.arange(videos), books)
    computed = numpy.zeros((books * videos, steps), dtype=numpy.bool_)
    rate = numpy.zeros((books * videos, steps), dtype=numpy.int32)
    for step in range(1, steps + 1):
        now = numpy.asarray(step)
        due = _due(state, now, numpy.asarray(steps))
        last = numpy.maximum(state[:, _LAST].astype(numpy.int64), 1)
        distance = distances[video, last - 1, step - 1]
        _choose(
            state,
            due,
            thresholds,
            rates,
            rule == RULES["published"],
            window,
            regularization,
            now,
            0,
            distance,
            motion[video, step - 1],
        )
        computed[:, step - 1], rate[:, step - 1] = due, state[:, _RATE]
    return computed.reshape(books, videos, steps), rate.reshape(books, videos, steps)


def _check_rule(rule: int) -> None:
    _require(rule in (0, 1), f"rule: expected 0 (published) or 1 (paper), got {rule}")


def _integers(name: str, values: Any, videos: int) -> Integers:
    """[num_videos] from one integer or one per video."""
    array = numpy.asarray(values)
    _require(array.dtype.kind in "iu", f"{name}: expected integers, got {values}")
    fits = array.ndim == 0 or array.shape == (videos,)
    _require(fits, f"{name}: expected an integer or [num_videos] = [{videos}], got {_shape(array)}")
    return numpy.broadcast_to(array.astype(numpy.int64), (videos,))


def _due(state: Doubles, step: Integers, num_steps: Integers) -> numpy.typing.NDArray[numpy.bool_]:
    due: numpy.typing.NDArray[numpy.bool_] = (state[:, _NEXT] == step) | (state[:, _LAST] == step)
    return due | (step == 1) | (step >= num_steps - 1)


def _choose(
    state: Doubles,
    due: numpy.typing.NDArray[numpy.bool_],
    thresholds: Doubles,
    rates: Doubles,
    published: bool,
    window: tuple[Integers, Integers],
    regularization: tuple[float, float, float, float],
    step: Integers,
    site: int,
    distance: Doubles,
    motion: Doubles,
) -> None:
    """`choose` of csrc/core/decide.h, for the rows that are due."""
    old, new = state, state.copy()
    first_site = old[:, _LAST] != step
    gap = numpy.where(first_site, old[:, _RATE] if published else step - old[:, _LAST], old[:, _GAP])
    count = numpy.where(first_site, 0, old[:, _COUNT])
    mean = numpy.where(first_site, 0, old[:, _MEAN])
    new[:, _NONFINITE] = numpy.where(first_site, 0, old[:, _NONFINITE])
    new[:, _LAST], new[:, _GAP] = step, gap
    new[:, _COUNT], new[:, _MEAN], new[:, _RATE], new[:, _NEXT] = count, mean, 1, 2
    first = due & (step == 1)  # no old residual
    state[first] = new[first]
    due = due & ~first
    previous = old[:, _FIRST_FACTOR + site]
    scale, power, divisor, gradient_weight = regularization
    inside = (window[0] <= step) & (step <= window[1])
    with numpy.errstate(all="ignore"):
        mean = (distance / gap + count * mean) / (count + 1)
        factor, next_previous = numpy.ones_like(mean), previous
        if scale > 0 and published:
            next_previous = numpy.where(inside, numpy.power(motion / scale, power) / divisor, 1)
            factor = next_previous + numpy.abs(gradient_weight * (next_previous - previous) / gap)
        elif scale > 0:
            gradient = numpy.where(numpy.isnan(previous), 0, gradient_weight * (motion - previous) / gap)
            factor = numpy.where(inside, (motion + gradient) / scale, 1)
            next_previous = numpy.where(inside, motion, previous)
        score = mean * factor
        below = score[:, None] < thresholds
    usable = numpy.isfinite(score) & numpy.isfinite(distance)
    if scale > 0:
        usable &= numpy.isfinite(motion) | ~inside
    entry = numpy.where(below.any(1), below.argmax(1), thresholds.shape[1] - 1)
    chosen = numpy.take_along_axis(numpy.broadcast_to(rates, below.shape), entry[:, None], 1)[:, 0]
    new[:, _COUNT], new[:, _DISTANCE], new[:, _MOTION] = count + 1, distance, motion
    new[:, _RATE] = numpy.where(usable, chosen, 1)
    new[:, _MEAN] = numpy.where(usable, mean, numpy.nan)
    new[:, _FACTOR] = numpy.where(usable, factor, 1)
    new[:, _NONFINITE] = numpy.where(usable, new[:, _NONFINITE], 1)
    new[:, _FIRST_FACTOR + site] = numpy.where(usable, next_previous, previous)
    new[:, _NEXT] = step + new[:, _RATE]
    state[due] = new[due]


def _distance(sums: Doubles, metric: int, published: bool, elements: float) -> Doubles:
    abs_diff, abs_old, _, sq_diff, sq_old, sq_new, dot = sums[:, :7].T
    distance: Doubles
    if metric == METRICS["cosine"]:
        distance = 1 - dot / numpy.sqrt(sq_old * sq_new)
    elif metric == METRICS["l2"]:
        distance = numpy.sqrt(sq_diff / (sq_old if published else elements))
    else:
        distance = abs_diff / (abs_old if published else elements)
    return distance


def _motion(sums: Doubles, strides: Sequence[int], frames: int, published: bool, elements: float) -> Doubles:
    total = numpy.zeros(len(sums))
    for index, stride in enumerate(strides):
        pairs = elements * (frames - stride) / frames
        total += sums[:, 7 + 2 * index] / (sums[:, 8 + 2 * index] if published else pairs)
    return total / len(strides) if strides else numpy.full(len(sums), numpy.nan)

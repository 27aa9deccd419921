# SPDX-License-Identifier: Apache-2.0
"""The decision rule for NumPy arrays, and simulated schedules. Uses the compiled code of the ops, or
NumPy where it is missing, without torch tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
import numpy.typing

from ._libraries import libraries
from .columns import metric_number, rule_number

__all__ = ["decide", "initial_state", "simulate"]

Doubles = numpy.typing.NDArray[numpy.float64]


def initial_state(num_videos: int, sites: int = 1, *, rule: str = "published") -> Doubles:
    """Return the state of a request before its first step: float64 [num_videos, 10 + sites].

    `state_columns(sites)` names the columns. Raises ValueError for counts below 1 and unknown rules.
    """
    state: Doubles = _engine().initial_state(num_videos, sites, rule_number(rule))
    return state


def decide(
    sums: numpy.typing.ArrayLike,
    state: Doubles,
    *,
    step: int | numpy.typing.ArrayLike,
    num_steps: int | numpy.typing.ArrayLike,
    thresholds: numpy.typing.ArrayLike,
    rates: numpy.typing.ArrayLike,
    frames: int,
    site: int = 0,
    strides: Sequence[int] = (1,),
    metric: str = "l1",
    rule: str = "published",
    elements: float = 0.0,
    window: tuple[int, int] | numpy.typing.ArrayLike = (1, 0),
    scale: float = 0.0,
    power: float = 1.0,
    divisor: float = 1.0,
    gradient_weight: float = 0.0,
) -> None:
    """`adacache_kernels.decide` for NumPy arrays. Updates `state` (float64, contiguous) in place.

    `step`, `num_steps`, `window` [num_videos, 2], `thresholds` and `rates` may be per video.

    Raises:
        ValueError: an argument is invalid, thresholds are not ascending, or rates are not integers >= 1;
            the message names the argument.
    """
    if rule == "paper" and not elements > 0:
        raise ValueError(
            f"elements: expected rows per video * N * C, which rule='paper' divides by, got {elements}"
        )
    edges = numpy.asarray(window)
    if edges.shape not in ((2,), (len(state), 2)):
        raise ValueError(
            f"window: expected (first step, last step) or [num_videos, 2] = [{len(state)}, 2], got {window!r}"
        )
    first_step, last_step = edges.T
    _engine().decide(
        sums=sums,
        state=state,
        thresholds=thresholds,
        rates=rates,
        step=step,
        num_steps=num_steps,
        site=site,
        frames=frames,
        strides=list(strides),
        metric=metric_number(metric),
        rule=rule_number(rule),
        elements=elements,
        first_step=first_step,
        last_step=last_step,
        scale=scale,
        power=power,
        divisor=divisor,
        gradient_weight=gradient_weight,
    )


def simulate(
    distances: numpy.typing.ArrayLike,
    motion: numpy.typing.ArrayLike,
    thresholds: numpy.typing.ArrayLike,
    rates: numpy.typing.ArrayLike,
    *,
    rule: str = "published",
    window: tuple[int, int] | None = None,
    scale: float = 0.385,
    power: float = 8.0,
    divisor: float = 1.0,
    gradient_weight: float = 10.0,
) -> tuple[numpy.typing.NDArray[numpy.bool_], numpy.typing.NDArray[numpy.int32]]:
    """Simulate the schedules of many codebooks from recorded distances. One metric site.

    Args:
        distances: [num_videos, N, N]; entry [v, i, j], i < j, is the undivided distance between the residuals
            of steps i and j (0-based). Other entries are not read.
        motion: [num_videos, N], the motion of the residual of each step.
        thresholds, rates: [codebooks, entries].
        rule: "published" or "paper".
        window: first and last step (1-based, inclusive) of motion regularization; None: no motion
            regularization.
        scale, power, divisor, gradient_weight: of motion regularization, see `adacache_kernels.decide`.

    Returns:
        computed, bool [codebooks, num_videos, N], and rate, int32 of the same shape, after each step.

    Raises:
        ValueError: shapes do not match, thresholds are not ascending, or rates are not integers >= 1;
            the message names the argument.
    """
    first_step, last_step = window or (1, 0)
    computed, rate = _engine().simulate(
        distances=distances,
        motion=motion,
        thresholds=thresholds,
        rates=rates,
        rule=rule_number(rule),
        motion_on=window is not None,
        first_step=first_step,
        last_step=last_step,
        scale=scale,
        power=power,
        divisor=divisor,
        gradient_weight=gradient_weight,
    )
    return computed, rate


def _engine() -> Any:
    """The compiled module, or NumPy code if it does not fit this Python (`adacache doctor` states why)."""
    if libraries()["engine"].loaded:
        from . import _engine as compiled

        return compiled
    from . import _engine_numpy

    return _engine_numpy

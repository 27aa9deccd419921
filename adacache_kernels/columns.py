# SPDX-License-Identifier: Apache-2.0
"""The columns of `sums` (measured by the ops) and `state` (of the decisions), and the initial state."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

__all__ = ["METRICS", "RULES", "initial_state", "state_columns", "sum_columns"]

#: Distance metrics, with their numbers in the schemas.
METRICS = {"l1": 0, "l2": 1, "cosine": 2}

#: Decision rules: of the published code, and the equations of the paper (arXiv 2411.02397).
RULES = {"published": 0, "paper": 1}

_DISTANCE_COLUMNS = ("abs_diff", "abs_old", "abs_new", "sq_diff", "sq_old", "sq_new", "dot")
_STATE_COLUMNS = (
    "last_step",
    "rate",
    "next_step",
    "prev_rate",
    "count",
    "mean",
    "distance",
    "motion",
    "factor",
    "nonfinite",
)


def sum_columns(strides: Sequence[int] = (1,)) -> tuple[str, ...]:
    """Return the names of the columns of `sums`, in order.

    Args:
        strides: frame strides of the motion term, as passed to the op.

    Returns:
        "abs_diff" = sum |r - old|, "abs_old" = sum |old|, "abs_new" = sum |r|, then "sq_diff", "sq_old",
        "sq_new" (the same with squares) and "dot" = sum r * old, then for each stride s "motion_diff_s" = sum
        |r[t+s] - r[t]| and "motion_sum_s" = sum (|r[t+s]| + |r[t]|) over latent frames t. With metric="l1"
        the squares and "dot" are NaN: they are not measured.
    """
    motion = (f"motion_{part}_{stride}" for stride in strides for part in ("diff", "sum"))
    return _DISTANCE_COLUMNS + tuple(motion)


def state_columns(sites: int = 1) -> tuple[str, ...]:
    """Return the names of the columns of `state`, in order. The last `sites` are "previous_factor_0", ..."""
    if sites < 1:
        raise ValueError(f"sites: expected at least 1, got {sites}")
    return _STATE_COLUMNS + tuple(f"previous_factor_{site}" for site in range(sites))


def initial_state(
    num_videos: int, sites: int = 1, *, rule: str = "published", device: torch.device | str | None = None
) -> torch.Tensor:
    """Return the state of a request before its first step.

    Args:
        num_videos: number of videos. Decisions are per video.
        sites: metric sites per step. Each has a previous motion factor, of the last computed step.
        rule: "published" initializes the previous motion factor to 1, like the published code; "paper" to NaN
            (none).
        device: the device of the sums.

    Returns:
        float64 [num_videos, 10 + sites], columns named by `state_columns(sites)`.
    """
    if num_videos < 0:
        raise ValueError(f"num_videos: expected at least 0, got {num_videos}")
    columns = state_columns(sites)
    row = dict.fromkeys(columns, 1.0 if rule_number(rule) == RULES["published"] else math.nan)
    row.update(last_step=0.0, rate=1.0, next_step=1.0, prev_rate=1.0, count=0.0, mean=0.0)
    row.update(distance=math.nan, motion=math.nan, factor=1.0, nonfinite=0.0)
    # Created on the host and copied asynchronously, because creation on the GPU would synchronize.
    values = torch.tensor([row[column] for column in columns], dtype=torch.float64)
    return values.repeat(num_videos, 1).to(device=device, non_blocking=True)


def metric_number(metric: str) -> int:
    try:
        return METRICS[metric]
    except (KeyError, TypeError):
        raise ValueError(f"metric: expected one of {', '.join(METRICS)}, got {metric!r}") from None


def rule_number(rule: str) -> int:
    try:
        return RULES[rule]
    except (KeyError, TypeError):
        raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}") from None

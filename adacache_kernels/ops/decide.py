# SPDX-License-Identifier: Apache-2.0
"""The decision rule: computes the next computed step from sums, on their device, without synchronization."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..columns import metric_number, rule_number
from ._dispatch import call


def decide(
    sums: torch.Tensor,
    state: torch.Tensor,
    *,
    step: int | torch.Tensor,
    num_steps: int | torch.Tensor,
    thresholds: torch.Tensor,
    rates: torch.Tensor,
    frames: int,
    site: int = 0,
    strides: Sequence[int] = (1,),
    metric: str = "l1",
    rule: str = "published",
    elements: float = 0.0,
    window: tuple[int, int] | torch.Tensor = (1, 0),
    scale: float = 0.0,
    power: float = 1.0,
    divisor: float = 1.0,
    gradient_weight: float = 0.0,
) -> None:
    """Update `state` in place from the sums of one metric site: rate and next computed step per video.

    A video is due if `step` is 1, num_steps-1 or num_steps, its next step, or its last step (a further site
    of the same step); rows of other videos do not change. Step 1 has no old residual, and its rate is 1.
    Step, schedule and codebook may differ per video, so that one call serves requests at different steps.
    Each video gets the bits of a call of its own.

    rule="published", the decisions of the published code: q = distance / previous rate, with distance
    sum|r-old| / sum|old| (l1), sqrt(sum (r-old)^2 / sum old^2) (l2) or 1 - r.old / (|r| |old|) (cosine); the
    mean of q over the sites of this step; with motion regularization factor = (m / scale)^power / divisor
    inside the window, otherwise 1, with m = mean over strides of motion_diff / motion_sum;
    score = mean * (factor + |gradient_weight * (factor - previous factor) / previous rate|).

    rule="paper", the equations: distance mean|r-old|, or the root of its mean square, divided by the elapsed
    steps; m = mean over strides of mean|r[t+s]-r[t]|; inside the window score = mean * (m + gradient_weight
    * (m - previous m) / elapsed steps) / scale; `power` and `divisor` are not used.

    The first threshold above the score selects the rate; above all thresholds, the last entry. A non-finite
    distance, or a non-finite motion inside the window, gives rate 1 and sets "nonfinite".

    Args:
        sums: float64 [num_videos, columns] of `gated_residual_meter` or `residual_meter`.
        state: float64 [num_videos, 10 + sites] of `initial_state`, updated in place; must not overlap other
            arguments; columns named by `state_columns(sites)`.
        step: number of the denoising step, 1-based; or int32 [num_videos].
        num_steps: denoising steps of the request; or int32 [num_videos].
        thresholds: float64 [entries] or [num_videos, entries], ascending, on the device of sums. A shorter
            codebook is padded with its last entry. Thresholds and rates are not checked.
        rates: float64 [entries] or [num_videos, entries] as thresholds, steps from this computed step to the
            next, at least 1.
        frames: latent frames of the measured residuals.
        site: metric site of the sums, 0-based.
        strides: frame strides of the sums.
        metric: "l1", "l2" or "cosine".
        rule: "published" or "paper".
        elements: rows per video * N * C; used only by rule="paper".
        window: first and last step (1-based, inclusive) of motion regularization; or int32 [num_videos, 2].
        scale: > 0 enables motion regularization.
        power, divisor, gradient_weight: see above.

    On CUDA the values of tensors are not checked, because that would synchronize.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.

    Source: AdaCache (arXiv 2411.02397), and `compute_next_step` of the published code.
    """
    metric_kind, rule_kind = metric_number(metric), rule_number(rule)
    if rule == "paper" and not elements > 0:
        raise ValueError(
            f"elements: expected rows per video * N * C, which rule='paper' divides by, got {elements}"
        )
    step_of_video, step = (step, 1) if isinstance(step, torch.Tensor) else (None, step)
    num_steps_of_video, num_steps = (
        (num_steps, 1) if isinstance(num_steps, torch.Tensor) else (None, num_steps)
    )
    window_of_video = None
    if isinstance(window, torch.Tensor):
        window_of_video, window = window, (1, 0)
    elif not isinstance(window, Sequence) or len(window) != 2:
        raise ValueError(f"window: expected (first step, last step), got {window!r}")
    by_video = (step_of_video, num_steps_of_video, window_of_video)
    place = (step, num_steps, site, frames, strides, metric_kind, rule_kind, elements, *window)
    regularisation = (scale, power, divisor, gradient_weight)
    call("decide", sums, state, thresholds, rates, *by_video, *place, *regularisation)

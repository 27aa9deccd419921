"""From sums to the next computed step, on the device of the sums, without synchronization."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..columns import metric_number, rule_number
from ._dispatch import call


def decide(
    sums: torch.Tensor,
    state: torch.Tensor,
    *,
    step: int,
    num_steps: int,
    thresholds: torch.Tensor,
    rates: torch.Tensor,
    frames: int,
    site: int = 0,
    strides: Sequence[int] = (1,),
    metric: str = "l1",
    rule: str = "published",
    elements: float = 0.0,
    window: tuple[int, int] = (1, 0),
    scale: float = 0.0,
    power: float = 1.0,
    divisor: float = 1.0,
    gradient_weight: float = 0.0,
) -> None:
    """Turn the sums of one metric site into a rate and a next computed step, per video, in place in `state`.

    A video is due if `step` is 1, num_steps-1 or num_steps, its next step, or its last step (a further site
    of the same step); other rows stay as they are. Step 1 has no old residual and always gives rate 1.

    rule="published", the decisions of the published code: q = distance / rate scheduled before, with distance
    sum|r-old| / sum|old| (l1), sqrt(sum (r-old)^2 / sum old^2) (l2) or 1 - r.old / (|r| |old|) (cosine); the
    mean of q over the sites so far; with motion regularisation factor = (m / scale)^power / divisor inside
    the window, else 1, with m = mean over strides of motion_diff / motion_sum; score = mean * (factor +
    |gradient_weight * (factor - previous factor) / rate scheduled before|).

    rule="paper", the equations: distance mean|r-old|, or the root of its mean square, divided by the steps
    elapsed; m = mean over strides of mean|r[t+s]-r[t]|; inside the window score = mean * (m + gradient_weight
    * (m - previous m) / steps elapsed) / scale; `power` and `divisor` are not used.

    The first threshold above the score gives the rate, past all thresholds the last entry does. A distance,
    or a motion that is used, which is not finite gives rate 1 and sets "nonfinite".

    Args:
        sums: float64 [num_videos, columns] of `gated_residual_meter` or `residual_meter`.
        state: float64 [num_videos, 10 + sites] of `initial_state`, changed in place, in memory of its own;
            columns named by `state_columns(sites)`.
        step: number of the denoising step, 1-based.
        num_steps: denoising steps of the request.
        thresholds: float64 [entries], ascending, on the device of sums. Their order and the rates are not
            checked.
        rates: float64 [entries], steps from this computed step to the next, at least 1.
        frames: latent frames the sums were taken over.
        site: metric site of the step that these sums are from, 0-based.
        strides: frame strides the sums were taken with.
        metric: "l1", "l2" or "cosine".
        rule: "published" or "paper".
        elements: rows per video * N * C; used only by rule="paper".
        window: first and last step (1-based, both included) in which motion counts.
        scale: > 0 turns motion regularisation on.
        power, divisor, gradient_weight: see above.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    Source: AdaCache (arXiv 2411.02397), and `compute_next_step` of the published code.
    """
    metric_kind, rule_kind = metric_number(metric), rule_number(rule)
    if rule == "paper" and not elements > 0:
        raise ValueError(
            f"elements: expected rows per video * N * C, which rule='paper' divides by, got {elements}"
        )
    if not isinstance(window, Sequence) or len(window) != 2:
        raise ValueError(f"window: expected (first step, last step), got {window!r}")
    place = (step, num_steps, site, frames, strides, metric_kind, rule_kind, elements, *window)
    regularisation = (scale, power, divisor, gradient_weight)
    call("decide", sums, state, thresholds, rates, *place, *regularisation)

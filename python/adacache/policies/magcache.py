# SPDX-License-Identifier: Apache-2.0
"""MagCache (arXiv 2506.09045): the ratio of the magnitudes of consecutive residuals hardly depends on the
input, so ratios that were measured once tell how much a reused residual is off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adacache.checks import array, number, whole
from adacache.policies.base import Decider, Keep, Kept, Plan, Step, check_steps, described
from adacache.policies.scheduled import Scheduled
from adacache.sites import ModelSites
from adacache.trace import Trace


@dataclass(frozen=True)
class MagCache(Scheduled):
    """Skips a step while sum |1 - p| < threshold and at most `most` steps were skipped in a row, where p is
    the product of the ratios since the last computed step. Else the step is computed, and both start anew.

    Attributes:
        ratios: one per step, mean(|r_t| / |r_(t-1)|) of the residual of the stack; the first is not used.
            `MagRatios` measures them. A list of another length is interpolated (nearest).
        threshold: of the accumulated error (published: 0.12).
        most: the most steps skipped in a row (published: 2).
        retention: fraction of the steps, at the start, that are computed (published: 0.2).
        cache, cache_dtype: see `Scheduled`.

    Published code has ratios of its own for each guidance branch; here all branches follow one list.
    """

    ratios: Sequence[float]
    threshold: float = 0.12
    most: int = 2
    retention: float = 0.2

    forecasts = False

    def __post_init__(self) -> None:
        ratios = array(number(above=0), least=1)(list(self.ratios), "ratios")
        object.__setattr__(self, "ratios", tuple(float(ratio) for ratio in ratios))
        number(above=0)(self.threshold, "threshold")
        whole(1)(self.most, "most")
        number(0, 1)(self.retention, "retention")
        super().__post_init__()

    def computes(self, step: Step) -> bool:
        return step.number in self.schedule(step.num_steps)

    def schedule(self, num_steps: int) -> list[int]:
        """The computed steps: they do not depend on the input."""
        ratios, count = self.ratios, len(self.ratios)
        if count != num_steps:
            scale = (count - 1) / max(1, num_steps - 1)
            ratios = [ratios[round(i * scale)] for i in range(num_steps)] if num_steps > 1 else ratios[-1:]
        computed: list[int] = []
        product, error, skipped = 1.0, 0.0, 0
        for i, ratio in enumerate(ratios):
            if i >= max(1, int(num_steps * self.retention)):
                product, skipped = product * ratio, skipped + 1
                error += abs(1 - product)
                if error < self.threshold and skipped <= self.most:
                    continue
                product, error, skipped = 1.0, 0.0, 0
            computed.append(i + 1)
        return computed


@dataclass(frozen=True)
class MagRatios:
    """Computes all steps and measures the ratios of `MagCache`; `ratios` reads them from the trace.

    Each step waits for the device. The batch counts as one video."""

    per_video = False

    def check(self, sites: ModelSites, num_steps: int) -> None:
        check_steps(num_steps)

    def start(
        self, sites: ModelSites, num_steps: int, num_videos: int, device: torch.device
    ) -> MagRatiosDecider:
        self.check(sites, num_steps)
        return MagRatiosDecider(sites)

    def describe(self) -> dict[str, Any]:
        return described(self)

    @staticmethod
    def ratios(*traces: Trace) -> list[float]:
        """The ratio of each step, averaged over traces of this policy.

        Raises:
            ValueError: a trace is of another policy or is not complete.
        """
        found: list[list[float]] = []
        for trace in traces:
            records = [one for one in trace.measurements if "ratio" in one]
            if len(records) != trace.num_steps:
                raise ValueError(
                    f"traces: expected {trace.num_steps} steps measured by MagRatios, got {len(records)}"
                )
            found.append([one["ratio"][0] for one in records])
        if not found or len({len(one) for one in found}) > 1:
            raise ValueError("traces: expected at least one, all with the same number of steps")
        return [sum(column) / len(found) for column in zip(*found, strict=True)]


class MagRatiosDecider(Decider):
    """The measurement of one request."""

    reads_kept = True

    def __init__(self, sites: ModelSites):
        self._stack = sites.stack
        self._name = sites.name(sites.stack)
        self._old: torch.Tensor | None = None
        self._records: list[dict[str, Any]] = []
        self.keeps = {sites.stack: Keep()}

    def plan(self, step: Step) -> Plan:
        return Plan()

    def finished(self, step: Step, kept: Kept) -> None:
        residual = kept.residual(self._stack)
        if residual is None:
            raise RuntimeError(
                "model: it modifies tokens between its blocks, so the residual of its stack is not stored"
            )
        sizes = residual.float().norm(dim=-1)
        ratio = 1.0 if self._old is None else float((sizes / (self._old + 1e-8)).mean())
        self._old = sizes
        self._records.append({"step": step.number, "site": self._name, "ratio": [ratio]})

    def records(self) -> list[dict[str, Any]]:
        return self._records

# SPDX-License-Identifier: Apache-2.0
"""Methods that measure inputs, block outputs or several residuals, and forecasts from accumulated sums: the
fused program of STDiT3 with guidance in one batch, against reference loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import adacache
import numpy as np
import pytest
import torch
from adacache.models.stdit3 import STDiT3
from adacache.policies import Step
from models import inputs, relative_error, rows_of
from test_method_rules import STEPS, run, run_slowly
from torch import Tensor

Reuses = Callable[[int, Tensor], bool]
"""(step from 1, tokens before the first block) -> whether the step is skipped."""


def change(new: Tensor, old: Tensor) -> float:
    return float((new.double() - old.double()).abs().sum() / old.double().abs().sum())


class Loop:
    """Reference loop that caches the residual of each block. All blocks run at every step.

    Args:
        reuses: the decision before the first block.
        probe: number of first blocks that every step computes; `probed` is the decision after them.
    """

    def __init__(self, reuses: Reuses | None = None, probe: int = 0):
        self.reuses, self.probe = reuses, probe
        self.computed: list[int] = []
        self.skip = False
        self.kept: dict[int, list[tuple[int, Tensor]]] = {}
        self.outputs: dict[int, list[Tensor]] = {}
        self.start = torch.empty(0)

    def probed(self, step: int, x: Tensor) -> bool:
        return False

    def forecast(self, step: int, kept: list[tuple[int, Tensor]]) -> Tensor:
        return kept[-1][1]

    def block(self, step: int, number: int, x: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        step += 1
        after = compute()
        if number == 0:
            self.start = x
        if number < self.probe:
            return after
        if number == self.probe:
            self.skip = self.reuses(step, x) if self.reuses is not None else self.probed(step, x)
            if not self.skip:
                self.computed.append(step)
        kept = self.kept.setdefault(number, [])
        if self.skip:
            return x + self.forecast(step, kept).float()
        kept.append((step, after.double() - x.double()))
        self.outputs.setdefault(number, []).append(after)
        return after


def check(model: STDiT3, policy: Any, make: Callable[[], Loop], tolerance: float = 2e-5) -> None:
    """Compares a batch of two videos with reference loops of single videos."""
    values = inputs(2, seed=2)
    values["z"] = values["z"] * torch.tensor([1.0, 2.5]).view(2, 1, 1, 1, 1)
    final, trace = run(model, policy, values)
    schedules = []
    for video in range(2):
        loop = make()
        expected = run_slowly(model, rows_of(values, video), block=loop.block)
        steps = trace.steps_of(video if trace.num_videos > 1 else 0)
        assert steps == loop.computed
        schedules.append(loop.computed)
        assert relative_error(final[video], expected[0]) < tolerance
    assert any(2 < len(steps) < STEPS for steps in schedules), schedules


class Sum:
    def __init__(self, threshold: float):
        self.threshold, self.value = threshold, 0.0

    def __call__(self, step: int, change: float) -> bool:
        self.value += change
        if 1 < step < STEPS and self.value < self.threshold:
            return True
        self.value = 0.0
        return False


def test_teacache(model: STDiT3) -> None:
    policy = adacache.TeaCache(coefficients=(2.0, 0.5, 0.0), threshold=1.5)
    seen: list[Tensor] = []
    hook = model.spatial_blocks[0].attn.register_forward_pre_hook(lambda _, args: seen.append(args[0]))

    def make() -> Loop:
        rule, old = Sum(policy.threshold), []

        def reuses(step: int, x: Tensor) -> bool:
            # The last input of the first spatial attention; later blocks have separate modules.
            old.append(seen[-1])
            own = change(old[-1], old[-2]) if len(old) > 1 else 0.0
            return rule(step, float(np.polyval(policy.coefficients, own)))

        return Loop(reuses)

    try:
        check(model, policy, make)
    finally:
        hook.remove()


def test_dicache(model: STDiT3) -> None:
    policy = adacache.DiCache(0.4, probe=2)
    used: list[float] = []

    class Probed(Loop):
        def __init__(self) -> None:
            super().__init__(probe=2)
            self.rule = Sum(policy.threshold)
            self.seen: list[tuple[Tensor, Tensor]] = []
            self.residuals: list[Tensor] = []
            self.g = 1.0

        def probed(self, step: int, x: Tensor) -> bool:
            self.seen.append((self.start, x))
            size = 0.0
            if len(self.seen) > 1:
                (a, b), (a_new, b_new) = self.seen[-2:]
                size = abs(change(b_new, b) - change(a_new, a))
            skip, residual = self.rule(step, size), x.double() - self.start.double()
            if not skip:
                self.residuals.append(residual)
            elif len(self.residuals) > 1:
                newest, before = self.residuals[-1], self.residuals[-2]
                self.g = float((residual - before).abs().sum() / (newest - before).abs().sum())
                self.g = min(1.5, max(1.0, self.g))
                used.append(self.g)
            return skip

        def forecast(self, step: int, kept: list[tuple[int, Tensor]]) -> Tensor:
            if len(kept) < 2:
                return kept[-1][1]
            return kept[-2][1] + self.g * (kept[-1][1] - kept[-2][1])

    check(model, policy, Probed)
    assert used


def test_bwcache(model: STDiT3) -> None:
    policy = adacache.BWCache(0.25, 0.15)

    def make() -> Loop:
        state: dict[str, Any] = {"left": 0, "first": None}

        def reuses(step: int, x: Tensor) -> bool:
            latest = loop.computed and loop.computed[-1] == step - 1
            if latest and len(loop.computed) > 1:
                changes = [change(new, old) for old, new in (own[-2:] for own in loop.outputs.values())]
                if sum(changes) / len(changes) < policy.threshold:
                    state["left"] = max(1, int(policy.share * STEPS))
                    state["first"] = state["first"] or STEPS - step + 2
            late = state["first"] is not None and STEPS - step + 1 <= state["first"] / 2
            skip = state["left"] > 0 and not late
            state["left"] = state["left"] - 1 if skip else 0
            return skip

        loop = Loop(reuses)
        return loop

    check(model, policy, make)


def test_seacache(model: STDiT3) -> None:
    """Both guidance rows have the latents of one video."""
    policy = adacache.SeaCache(0.3, most=3)
    latents: list[Tensor] = []
    embed = model.embed

    def noted(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        latents.append(x)
        return embed(x, *args, **kwargs)

    def make() -> Loop:
        rule, old, skipped = Sum(policy.threshold), [], [0]

        def reuses(step: int, x: Tensor) -> bool:
            old.append(policy.filtered(latents[-1], 1 - (step - 1) / STEPS))
            size = change(old[-1], old[-2]) if step > 1 else 0.0
            if skipped[0] == policy.most:
                rule.value = float("inf")
            skip = rule(step, size)
            skipped[0] = skipped[0] + 1 if skip else 0
            return skip

        class Linear(Loop):
            def forecast(self, step: int, kept: list[tuple[int, Tensor]]) -> Tensor:
                now, residual = kept[-1]
                if len(kept) < 2:
                    return residual
                before, old = kept[-2]
                return residual + (residual - old) * ((step - now) / (now - before))

        return Linear(reuses)

    model.__dict__["embed"] = noted
    try:
        check(model, policy, make)
    finally:
        del model.__dict__["embed"]


@pytest.mark.parametrize("tail", [0, 2])
def test_dbcache(model: STDiT3, tail: int) -> None:
    policy = adacache.DBCache(2, tail, 0.6, first=3)

    class Probed(Loop):
        def __init__(self) -> None:
            super().__init__(probe=2)
            self.residual = torch.empty(0)

        def probed(self, step: int, x: Tensor) -> bool:
            residual = x - self.start
            skip = step > 3 and change(residual, self.residual) < policy.threshold
            if not skip:
                self.residual = residual
            return skip

        def block(self, step: int, number: int, x: Tensor, compute: Callable[[], Tensor]) -> Tensor:
            return compute() if number >= 8 - tail else super().block(step, number, x, compute)

    check(model, policy, Probed)


@pytest.mark.parametrize("cache", ["stack", "block"])
def test_spectrum(model: STDiT3, cache: str) -> None:
    policy = adacache.Spectrum(first=3, cache=cache)

    class Fitted(Loop):
        def forecast(self, step: int, kept: list[tuple[int, Tensor]]) -> Tensor:
            def basis(steps: list[int]) -> Tensor:
                t = [2 * (one - 1) / (STEPS - 1) - 1 for one in steps]
                return torch.from_numpy(np.polynomial.chebyshev.chebvander(t, policy.degree))

            rows = basis([one for one, _ in kept])
            features = torch.stack([feature.flatten() for _, feature in kept])
            gram = rows.T @ rows + policy.ridge * torch.eye(policy.degree + 1, dtype=torch.double)
            fit = torch.linalg.solve(gram, rows.T @ features)
            return (basis([step]) @ fit).view(kept[-1][1].shape)

    check(model, policy, lambda: Fitted(lambda step, x: not policy.computes(Step(step, STEPS))))


def test_delta_dit(model: STDiT3) -> None:
    policy, values = adacache.DeltaDiT(3, gate=6, interval=2), inputs(2, seed=2)
    kept: dict[int, Tensor] = {}

    def block(step: int, number: int, x: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        skipped = number >= 5 if step < 6 else number < 3
        after = compute()
        if step % 2 and skipped:
            return x + kept[number]
        kept[number] = after - x
        return after

    expected = run_slowly(model, values, block=block)
    assert relative_error(run(model, policy, values)[0], expected) < 2e-5


@pytest.mark.parametrize(
    "policy",
    [
        adacache.MagRatios(),
        adacache.TeaCacheChanges(),
        adacache.TeaCache(threshold=1e-9),
        adacache.DiCache(1e-9),
        adacache.BWCache(1e-9),
        adacache.SeaCache(1e-9),
        adacache.DBCache(threshold=1e-9, probe=2),
        adacache.Interval(1),
        adacache.TGATE(gate=STEPS, interval=1),
    ],
    ids=lambda policy: type(policy).__name__,
)
def test_computing_every_step_is_bit_identical(model: STDiT3, policy: Any) -> None:
    values = inputs(1)
    always = run(model, adacache.AdaCache(codebook={9.0: 1}), values)[0]
    final, trace = run(model, policy, values)
    assert torch.equal(final, always)
    assert trace.computed_steps == list(range(1, STEPS + 1))

# SPDX-License-Identifier: Apache-2.0
"""Methods that measure inputs of the model or outputs of blocks, on models of diffusers, against reference
loops with hooks on a plain model, and against diffusers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import adacache
import numpy as np
import pytest
import torch
from adacache.policies import sencache, teacache
from model_cases import COGVIDEOX, LATTE, WAN, Case, relative_error
from test_methods import CHILDREN, STEPS, Clock, blocks_replaced, children, mixed_values, run_slowly, steps_of
from test_models import enabled
from torch import Tensor, nn

pytest.importorskip("diffusers", reason="diffusers is not installed")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

CHECKED = [WAN, COGVIDEOX]
"""Models of the tests with a `case` (conftest.py)."""


def change(new: Tensor, old: Tensor) -> float:
    return float((new.double() - old.double()).abs().mean() / old.double().abs().mean())


class Sum:
    """An accumulated change that is reset to 0 at the threshold."""

    def __init__(self, threshold: float, first: int = 1, last: int = 1, most: int = STEPS):
        self.threshold, self.first, self.last, self.most = threshold, first, last, most
        self.value, self.computed = 0.0, [1]

    def reuses(self, step: int, change: float | None) -> bool:
        """`change` is ignored at the first step."""
        self.value += change or 0.0
        inner = self.first < step <= STEPS - self.last
        if inner and self.value < self.threshold and step - self.computed[-1] <= self.most:
            return True
        self.value = 0.0
        if step > 1:
            self.computed.append(step)
        return False


def stack_slowly(
    case: Case,
    model: nn.Module,
    inputs: dict[str, Any],
    clock: Clock,
    reuses: Callable[[int], bool],
    order: int = 0,
) -> Tensor:
    """Reference loop that reuses the residual of each block or forecasts it linearly. It calls `reuses` once
    per step, at the first block."""
    kept: dict[tuple[int, int], list[tuple[int, Tensor]]] = {}
    now = {"reuse": False, "step": 0}

    def rule(position: int, before: list[Tensor], after: list[Tensor]) -> list[Tensor]:
        if position == 0:
            now["reuse"] = reuses(clock.step)
        found = []
        for k, (x, y) in enumerate(zip(before, after, strict=True)):
            history = kept.setdefault((position, k), [])
            if not now["reuse"]:
                history.append((clock.step, y - x))
                found.append(y)
                continue
            step, residual = history[-1]
            if order and len(history) > 1:
                older, old = history[-2]
                residual = residual + (residual - old) * ((clock.step - step) / (step - older))
            found.append(x + residual)
        return found

    with blocks_replaced(case, model, rule):
        return run_slowly(case, model, inputs, clock)


# TeaCache.


def teacache_slowly(
    case: Case, model: nn.Module, inputs: dict[str, Any], policy: adacache.TeaCache
) -> tuple[Tensor, list[int], list[float]]:
    rule, clock = Sum(policy.threshold), Clock()
    seen: list[Tensor] = []
    changes: list[float] = []
    first = children(case, model, next(part for part in CHILDREN[case.name] if "attention" in part))[0]

    def note(_: Any, args: Any, kwargs: Any) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    def reuses(step: int) -> bool:
        own = change(seen[-1], seen[-2]) if len(seen) > 1 else 0.0
        changes.append(float(np.polyval(policy.coefficients, own)))
        return rule.reuses(step, changes[-1])

    hook = first.register_forward_pre_hook(note, with_kwargs=True)
    try:
        return stack_slowly(case, model, inputs, clock, reuses), rule.computed, changes[1:]
    finally:
        hook.remove()


@pytest.mark.parametrize("model_case", [WAN, COGVIDEOX, LATTE], ids=lambda case: case.name)
@pytest.mark.parametrize("cache", ["stack", "block"])
def test_teacache_follows_its_rule(model_case: Case, cache: str) -> None:
    """A batch of videos against reference loops of single videos."""
    case = model_case
    model, inputs = case.model(), mixed_values(case)
    policy = adacache.TeaCache(coefficients=(1.5, 0.9, 0.01), threshold=0.5, cache=cache)
    with enabled(model, policy, STEPS) as handle:
        final = case.denoise(model, inputs, STEPS)
    schedules = set()
    for video in range(3):
        expected, computed, changes = teacache_slowly(case, model, case.rows(inputs, video), policy)
        schedules.add(tuple(computed))
        assert handle.trace.steps_of(video) == computed
        ((_, measured),) = handle.trace.series("distance", video).items()
        assert [value for _, value in measured] == pytest.approx(changes, rel=1e-3)
        assert relative_error(final[video], expected[0]) < case.tolerance
    assert any(2 < len(steps) < STEPS for steps in schedules)


def test_teacache_fit() -> None:
    """The measured changes equal those of the reference loop, and the fit is their least-squares fit."""
    case = WAN
    model, inputs = case.model(), case.values()
    with enabled(model, adacache.TeaCacheChanges(), STEPS) as handle:
        case.denoise(model, inputs, STEPS)
    assert handle.trace.computed_steps == list(range(1, STEPS + 1))
    _, _, changes = teacache_slowly(case, model, inputs, adacache.TeaCache(threshold=1e-9))
    found = {site: [value for _, value in points] for site, points in handle.trace.series("distance").items()}
    assert found["input"] == pytest.approx(changes, rel=1e-3)
    coefficients = teacache.fit(handle.trace, degree=2)
    residual = np.polyval(coefficients, found["input"]) - found["output"]
    assert np.abs(np.vander(found["input"], 3).T @ residual).max() < 1e-6
    with pytest.raises(ValueError, match="traces: expected more than 20 steps"):
        teacache.fit(handle.trace, degree=20)


def test_teacache_restores_the_model() -> None:
    case = WAN
    model, inputs = case.model(), case.values()
    plain = case.denoise(model, inputs, STEPS)
    with enabled(model, adacache.TeaCache(threshold=1e-9), STEPS):
        assert torch.equal(case.denoise(model, inputs, STEPS), plain)
    assert not any("adacache" in name for module in model.modules() for name in module.__dict__)
    assert torch.equal(case.denoise(model, inputs, STEPS), plain)


# EasyCache.


def test_easycache_follows_its_rule(case: Case) -> None:
    model, inputs = case.model(), case.values(2)
    policy = adacache.EasyCache(threshold=0.6, first=3)
    rule = Sum(policy.threshold, first=3)
    z, before, rate = inputs[case.latents], None, None
    kept: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for step in range(1, STEPS + 1):
            moved = 0.0
            if rate is not None:
                moved = rate * float((z - before).abs().mean()) / float(kept[-1][1].abs().mean())
            if rule.reuses(step, moved):
                output = z + (kept[-1][1] - kept[-1][0])
            else:
                output = case.predict(model, inputs, z, step - 1, STEPS)
                kept.append((z, output))
                if len(kept) > 1:
                    (x, y), (x_new, y_new) = kept[-2:]
                    rate = float((y_new - y).abs().mean() / (x_new - x).abs().mean())
            before, z = z, z - output / STEPS
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    hook = case.blocks(model)[0][1].register_forward_pre_hook(count)
    with enabled(model, policy, STEPS) as handle:
        final = case.denoise(model, inputs, STEPS)
    hook.remove()
    assert handle.trace.computed_steps == rule.computed
    assert 3 < len(rule.computed) < STEPS
    assert calls == len(rule.computed)
    assert relative_error(final, z) < case.tolerance


def test_easycache_requires_an_output_like_the_latents() -> None:
    """Latte also predicts a variance."""
    with (
        enabled(LATTE.model(), adacache.EasyCache(), STEPS) as handle,
        pytest.raises(ValueError, match="model: expected one output of the latents' shape"),
    ):
        LATTE.denoise(handle.model, LATTE.values(), STEPS)


# SeaCache.


@pytest.mark.parametrize(("order", "most"), [(0, 2), (1, 2), (1, 5)])
def test_seacache_follows_its_rule(order: int, most: int) -> None:
    """The reference filter is an explicit sum over frequencies."""
    case = WAN
    model, inputs = case.model(), mixed_values(case)
    policy = adacache.SeaCache(threshold=0.15, order=order, most=most)
    with enabled(model, policy, STEPS) as handle:
        final = case.denoise(model, inputs, STEPS)

    def filtered(x: Tensor, sigma: float) -> Tensor:
        for axis in (2, 3, 4):
            size = x.shape[axis]
            index = np.arange(size)
            frequency = np.minimum(index, size - index) / size
            power = 1 / (frequency**3 + 1e-16)
            gain = (1 - sigma) * power / ((1 - sigma) ** 2 * power + sigma**2)
            wave = np.exp(2j * np.pi * np.outer(index, index) / size)
            matrix = (wave * (gain / gain.mean())) @ wave.conj().T / size
            x = torch.tensordot(x.double(), torch.from_numpy(matrix.real), ([axis], [1])).movedim(-1, axis)
        return x

    schedules = set()
    for video in range(3):
        rule, clock = Sum(policy.threshold, most=most), Clock()
        seen: list[Tensor] = []

        def reuses(step: int, rule: Sum = rule, seen: list[Tensor] = seen) -> bool:
            return rule.reuses(step, change(seen[-1], seen[-2]) if step > 1 else None)

        def note(_: Any, args: Any, kwargs: Any, clock: Clock = clock, seen: list[Tensor] = seen) -> None:
            sigma = max(1e-6, min(1 - 1e-6, clock.time / 1000))
            seen.append(filtered(kwargs["hidden_states"], sigma))

        hook = model.register_forward_pre_hook(note, with_kwargs=True)
        expected = stack_slowly(case, model, case.rows(inputs, video), clock, reuses, order)
        hook.remove()
        schedules.add(tuple(rule.computed))
        assert handle.trace.steps_of(video) == rule.computed
        assert relative_error(final[video], expected[0]) < case.tolerance
    assert any(2 < len(steps) < STEPS for steps in schedules)


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("threshold", [0.1, 0.25])
def test_seacache_matches_diffusers(order: int, threshold: float) -> None:
    hooks = pytest.importorskip("diffusers.hooks.sea_cache", reason="requires diffusers 0.42 or later")
    case = WAN
    model, values, clock = case.model(), case.values(seed=4), Clock()
    hooks.apply_sea_cache(model, hooks.SeaCacheConfig(threshold=threshold, residual_order=order))
    steps = steps_of(case.blocks(model)[1][1], "fn_ref", clock)
    z = values[case.latents]
    with torch.no_grad():
        for step in range(STEPS):
            clock.step, sigma = step + 1, 1 - step / STEPS
            with model.cache_context("cond", step_index=step, sigma=sigma, num_inference_steps=STEPS):
                z = z - case.predict(model, values, z, step, STEPS) / STEPS
    model = case.model()
    with enabled(model, adacache.SeaCache(threshold=threshold, order=order), STEPS) as handle:
        final = case.denoise(model, values, STEPS)
    assert handle.trace.computed_steps == steps
    assert 1 < len(steps) < STEPS
    assert relative_error(final, z) < 1e-5


# SenCache.


def test_sencache_follows_its_rule(case: Case) -> None:
    model, inputs = case.model(), case.values(2)
    a_x, a_t = [0.5 + 0.1 * i for i in range(STEPS)], [1e-4 * (i + 1) for i in range(STEPS)]
    policy = adacache.SenCache(a_x, a_t, threshold=0.3, early=0.15, most=2)
    z, output, computed, x, t = inputs[case.latents], None, [], None, 0.0
    with torch.no_grad():
        for step in range(1, STEPS + 1):
            time = case.schedule * (1 - (step - 1) / STEPS)
            threshold = 0.15 if step <= STEPS / 5 else 0.3
            if step > 1:
                moved = float((z - x).double().square().mean().sqrt())
                size = a_x[step - 1] * moved + a_t[step - 1] * abs(time - t)
            if step == 1 or size > threshold or step - computed[-1] > 2:
                output = case.predict(model, inputs, z, step - 1, STEPS)
                x, t = z, time
                computed.append(step)
            z = z - output / STEPS
    with enabled(model, policy, STEPS) as handle:
        final = case.denoise(model, inputs, STEPS)
    assert handle.trace.computed_steps == computed
    assert 2 < len(computed) < STEPS
    assert torch.equal(final, z)


def test_sencache_sensitivities() -> None:
    """The sensitivities of a linear function are its factors."""
    states = [torch.randn(2, 3, 4) for _ in range(5)]
    times = [1.0, 0.8, 0.5, 0.4, 0.1]
    a_x, a_t = sencache.sensitivities(lambda x, t: 3.0 * x + 2.0 * t, states, times)
    assert a_x == pytest.approx([3.0] * 4, rel=1e-5)
    assert a_t == pytest.approx([2.0] * 4, rel=1e-4)


# DiCache.


@pytest.mark.parametrize(("probe", "error"), [(1, "difference"), (2, "difference"), (1, "probe")])
def test_dicache_follows_its_rule(case: Case, probe: int, error: str) -> None:
    model, inputs = case.model(), mixed_values(case)
    threshold = {"difference": 0.25, "probe": 0.8}[error]
    policy = adacache.DiCache(threshold, probe, error)
    with enabled(model, policy, STEPS) as handle:
        final = case.denoise(model, inputs, STEPS)
    schedules, aligned = set(), []
    for video in range(3):
        rule, clock = Sum(threshold), Clock()
        seen: list[tuple[Tensor, Tensor]] = []
        probes: list[Tensor] = []
        kept: dict[tuple[int, int], list[Tensor]] = {}
        now: dict[str, Any] = {}

        def decide(position: int, before: list[Tensor], after: list[Tensor]) -> list[Tensor]:
            if position == 0:
                now["x"] = before[0]  # noqa: B023
            if position == probe - 1:
                seen.append((now["x"], after[0]))  # noqa: B023
                size = None
                if len(seen) > 1:  # noqa: B023
                    (x, y), (x_new, y_new) = seen[-2:]  # noqa: B023
                    size = change(y_new, y)
                    size = abs(size - change(x_new, x)) if error == "difference" else size
                now["reuse"] = rule.reuses(clock.step, size)  # noqa: B023
                residual = after[0] - now["x"]  # noqa: B023
                if not now["reuse"]:  # noqa: B023
                    probes.append(residual)  # noqa: B023
                elif len(probes) > 1:  # noqa: B023
                    g = (residual - probes[-2]).abs().mean() / (probes[-1] - probes[-2]).abs().mean()  # noqa: B023
                    now["g"] = min(1.5, max(1.0, float(g)))  # noqa: B023
                    aligned.append(now["g"])  # noqa: B023
            if position < probe:
                return after
            found = []
            for k, (x, y) in enumerate(zip(before, after, strict=True)):
                history = kept.setdefault((position, k), [])  # noqa: B023
                if not now["reuse"]:  # noqa: B023
                    history.append(y - x)
                    found.append(y)
                elif len(history) > 1:
                    found.append(x + history[-2] + now["g"] * (history[-1] - history[-2]))  # noqa: B023
                else:
                    found.append(x + history[-1])
            return found

        with blocks_replaced(case, model, decide):
            expected = run_slowly(case, model, case.rows(inputs, video), clock)
        schedules.add(tuple(rule.computed))
        assert handle.trace.steps_of(video) == rule.computed
        assert relative_error(final[video], expected[0]) < case.tolerance
    assert any(2 < len(steps) < STEPS for steps in schedules)
    assert any(1 < g < 1.5 for g in aligned) or error == "probe"


# BWCache.


@pytest.mark.parametrize("cache", ["stack", "block"])
@pytest.mark.parametrize("share", [0.1, 0.2])
def test_bwcache_follows_its_rule(case: Case, cache: str, share: float) -> None:
    model, inputs = case.model(), mixed_values(case)
    policy = adacache.BWCache({WAN.name: 0.35, COGVIDEOX.name: 0.7}[case.name], share, cache)
    with enabled(model, policy, STEPS) as handle:
        final = case.denoise(model, inputs, STEPS)
    schedules = set()
    for video in range(3):
        clock = Clock()
        old: dict[int, Tensor] = {}
        changes: list[float] = []
        state = {"left": 0, "first": None}
        computed: list[int] = []

        def reuses(step: int) -> bool:
            if changes:  # noqa: B023
                mean = sum(changes) / len(changes)  # noqa: B023
                changes.clear()  # noqa: B023
                if mean < policy.threshold:
                    state["left"] = max(1, int(share * STEPS))  # noqa: B023
                    state["first"] = state["first"] or STEPS - step + 2  # noqa: B023
            to_go = STEPS - step + 1
            late = state["first"] is not None and to_go <= state["first"] / 2  # noqa: B023
            reuse = state["left"] > 0 and not late  # noqa: B023
            state["left"] = state["left"] - 1 if reuse else 0  # noqa: B023
            if not reuse:
                computed.append(step)  # noqa: B023
            return reuse

        def note(position: int) -> Callable[..., None]:
            def hook(_: Any, args: Any, kwargs: Any, output: Any) -> None:
                new = output if isinstance(output, Tensor) else output[0]
                if computed and computed[-1] == clock.step:  # noqa: B023
                    if position in old:  # noqa: B023
                        changes.append(change(new, old[position]))  # noqa: B023
                    old[position] = new  # noqa: B023

            return hook

        expected = stack_noted(case, model, case.rows(inputs, video), clock, reuses, note)
        schedules.add(tuple(computed))
        assert handle.trace.steps_of(video) == computed
        assert relative_error(final[video], expected[0]) < case.tolerance
    assert any(2 < len(steps) < STEPS for steps in schedules)


def stack_noted(
    case: Case,
    model: nn.Module,
    inputs: dict[str, Any],
    clock: Clock,
    reuses: Callable[[int], bool],
    note: Callable[[int], Callable[..., None]],
) -> Tensor:
    """`stack_slowly` with a forward hook on each block."""
    hooks: list[Any] = []

    def reuses_first(step: int) -> bool:
        if not hooks:  # registered after the hooks that replace outputs
            for i, (_, block) in enumerate(case.blocks(model)):
                hooks.append(block.register_forward_hook(note(i), with_kwargs=True))
        return reuses(step)

    final = stack_slowly(case, model, inputs, clock, reuses_first)
    for hook in hooks:
        hook.remove()
    return final

# SPDX-License-Identifier: Apache-2.0
"""Further methods on models of diffusers, against reference loops with hooks on a plain model, and against
diffusers and cache-dit if these implement the method."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import adacache
import pytest
import torch
from adacache.policies import Step
from model_cases import COGVIDEOX, WAN, Case, relative_error
from test_methods import STEPS, Clock, blocks_replaced, children, mixed_values, replaced, run_slowly, steps_of
from test_models import enabled
from torch import Tensor, nn

pytest.importorskip("diffusers", reason="diffusers is not installed")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

CHECKED = [WAN, COGVIDEOX]
"""Models of the tests with a `case` (conftest.py)."""


def computed_by(policy: Any, steps: int = STEPS) -> list[int]:
    return [step for step in range(1, steps + 1) if policy.computes(Step(step, steps))]


@dataclass
class Values:
    """A feature at every previous step, computed or forecast.

    Attributes:
        forecast: (these values, step) -> the feature at a step that is not computed.
        computed: the computed steps.
    """

    forecast: Callable[[Values, int], Tensor]
    computed: list[int] = field(default_factory=list)
    value: dict[int, Tensor] = field(default_factory=dict)

    def at(self, step: int, new: Tensor | None) -> Tensor:
        if new is not None:
            self.computed.append(step)
            self.value[step] = new.double()
        else:
            self.value[step] = self.forecast(self, step)
        return self.value[step]


def last(values: Values, step: int) -> Tensor:
    return values.value[values.computed[-1]]


def blocks_slowly(
    case: Case,
    model: nn.Module,
    inputs: dict[str, Any],
    computed: list[int],
    forecast: Callable[[Values, int], Tensor],
) -> Tensor:
    """Reference loop that forecasts the residual of each block. Forecasts are linear, so the forecast of the
    stack is their sum."""
    clock, features = Clock(), {}

    def rule(position: int, before: list[Tensor], after: list[Tensor]) -> list[Tensor]:
        found = []
        for k, (x, y) in enumerate(zip(before, after, strict=True)):
            values = features.setdefault((position, k), Values(forecast))
            new = values.at(clock.step, y - x if clock.step in computed else None)
            found.append(y if clock.step in computed else x + new.float())
        return found

    with blocks_replaced(case, model, rule):
        return run_slowly(case, model, inputs, clock)


def check_schedule(
    case: Case, policy: Any, computed: list[int], forecast: Callable[[Values, int], Tensor]
) -> None:
    model, inputs = case.model(), case.values(2)
    expected = blocks_slowly(case, model, inputs, computed, forecast)
    assert relative_error(run_slowly(case, model, inputs, Clock()), expected) > 1e-3, "no reuse"
    with enabled(model, policy, STEPS) as handle:
        final = case.denoise(model, inputs, STEPS)
    assert handle.trace.computed_steps == computed
    assert 1 < len(computed) < STEPS
    assert relative_error(final, expected) < case.tolerance
    assert handle.trace.policy["policy"] == type(policy).__name__


# Interval.


@pytest.mark.parametrize(
    ("settings", "computed"),
    [
        ({}, [1, 6, 11]),
        ({"interval": 3, "first": 2, "last": 2}, [1, 2, 5, 8, 11, 13, 14]),
        ({"interval": 4, "phase": 2, "cache": "block"}, [1, 3, 7, 11]),
    ],
)
def test_interval_follows_its_rule(case: Case, settings: dict[str, Any], computed: list[int]) -> None:
    check_schedule(case, adacache.Interval(**settings), computed, last)


def test_a_schedule_on_the_models_own_output(case: Case) -> None:
    model, inputs = case.model(), case.values(2)
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    z, kept = inputs[case.latents], None
    with torch.no_grad():
        for step in range(STEPS):
            if step % 3 == 0:
                kept = case.predict(model, inputs, z, step, STEPS)
            z = z - kept / STEPS
    hook = case.blocks(model)[0][1].register_forward_pre_hook(count)
    for cache in ("branch", "guided"):
        calls = 0
        with enabled(model, adacache.Interval(3, cache=cache), STEPS) as handle:
            assert torch.equal(case.denoise(model, inputs, STEPS), z)
        assert handle.trace.computed_steps == [1, 4, 7, 10, 13]
        assert calls == 5
    hook.remove()


# FoCa.


def foca(horizon: int | None) -> Callable[[Values, int], Tensor]:
    def forecast(values: Values, step: int) -> Tensor:
        value, computed = values.value, values.computed
        feature, k = value[computed[-1]], step - computed[-1]
        if len(computed) == 1:
            return feature
        reach = k if horizon is None or k <= horizon else horizon * (horizon / k)
        slopes = (feature - value[computed[-2]]) + (value[step - 1] - value[step - 2])
        return feature + reach / 2 * slopes

    return forecast


@pytest.mark.parametrize(
    "settings", [{}, {"interval": 4, "first": 2, "horizon": 2}, {"horizon": 3, "last": 2}]
)
def test_foca_follows_its_rule(case: Case, settings: dict[str, Any]) -> None:
    policy = adacache.FoCa(**settings)
    check_schedule(case, policy, computed_by(policy), foca(policy.horizon))


def test_foca_matches_cache_dit() -> None:
    """Forecasts of one tensor over 24 steps."""
    calibrators = pytest.importorskip("cache_dit.caching.cache_contexts.calibrators.foca")
    policy, theirs = adacache.FoCa(interval=5, first=2, horizon=3), calibrators.FoCaState()
    values = Values(foca(3))
    for step in range(1, 25):
        theirs.mark_step_begin()
        new = torch.randn(3, 4, dtype=torch.double) if policy.computes(Step(step, 24)) else None
        mine = values.at(step, new)
        if new is None:
            assert torch.allclose(theirs.approximate(), mine)
        else:
            theirs.update(new)


# Spectrum.


def spectrum(policy: adacache.Spectrum, steps: int) -> Callable[[Values, int], Tensor]:
    """The ridge fit, as least squares with `degree + 1` additional equations."""

    def basis(step: int) -> list[float]:
        angle = math.acos(max(-1.0, min(1.0, 2 * (step - 1) / (steps - 1) - 1)))
        return [math.cos(k * angle) for k in range(policy.degree + 1)]

    def forecast(values: Values, step: int) -> Tensor:
        features = torch.stack([values.value[one] for one in values.computed]).flatten(1)
        rows = torch.tensor([basis(one) for one in values.computed], dtype=torch.double)
        ridge = policy.ridge**0.5 * torch.eye(policy.degree + 1, dtype=torch.double)
        nothing = torch.zeros(len(ridge), features.shape[1], dtype=torch.double)
        fit = torch.linalg.lstsq(torch.cat((rows, ridge)), torch.cat((features, nothing))).solution
        predicted = torch.tensor([basis(step)], dtype=torch.double) @ fit
        return predicted.view(values.value[1].shape)

    return forecast


@pytest.mark.parametrize(
    ("settings", "computed"),
    [
        ({"first": 3}, [1, 2, 3, 5, 7, 10, 14]),
        ({"degree": 2, "ridge": 1.0, "growth": 3.0, "cache": "block"}, [1, 2, 3, 4, 5, 7, 12]),
        ({"degree": 6, "first": 2, "window": 3, "growth": 0}, [1, 2, 5, 8, 11, 14]),
    ],
)
def test_spectrum_follows_its_rule(case: Case, settings: dict[str, Any], computed: list[int]) -> None:
    policy = adacache.Spectrum(**settings)
    check_schedule(case, policy, computed, spectrum(policy, STEPS))


def test_spectrum_computes_as_many_steps_as_published() -> None:
    assert len(computed_by(adacache.Spectrum(), 50)) == 14
    assert len(computed_by(adacache.Spectrum(growth=3), 50)) == 10


def test_spectrum_memory_is_independent_of_the_number_of_steps() -> None:
    model, inputs = WAN.model(), WAN.values()
    sizes = {}
    for policy in (adacache.Interval(), adacache.Spectrum(first=3), adacache.Spectrum(first=10)):
        with enabled(model, policy, STEPS) as handle:
            WAN.denoise(model, inputs, STEPS)
        sizes[policy] = handle.trace.cache_bytes
    one, *both = sizes.values()
    assert both == [6 * one, 6 * one]


# DPCache and the schedules of other planners.


@pytest.mark.parametrize("order", [0, 1, 2])
def test_dpcache_follows_its_rule(case: Case, order: int) -> None:
    path = [1, 2, 3, 6, 7, 11, 14]

    def forecast(values: Values, step: int) -> Tensor:
        def factor(i: int, at: int) -> Tensor:
            if i == 0:
                return values.value[values.computed[at]]
            gap = values.computed[at] - values.computed[at - 1]
            return (factor(i - 1, at) - factor(i - 1, at - 1)) / gap

        ahead = step - values.computed[-1]
        return sum(factor(i, -1) * ahead**i / math.factorial(i) for i in range(order + 1))

    check_schedule(case, adacache.DPCache(computed=path, order=order), path, forecast)


# MagCache.

RATIOS = [1.0, 1.3, 1.1, 1.08, 1.05, 1.02, 1.01, 0.99, 1.0, 0.97, 0.98, 0.95, 0.93, 0.9]


@pytest.mark.parametrize("cache", ["stack", "block"])
def test_magcache_follows_its_rule(case: Case, cache: str) -> None:
    computed, product, error, skips = [], 1.0, 0.0, 0
    for step, ratio in enumerate(RATIOS, 1):
        if step > 2:
            product, skips = product * ratio, skips + 1
            error += abs(1 - product)
        if step <= 2 or error >= 0.12 or skips > 2:
            product, error, skips = 1.0, 0.0, 0
            computed.append(step)
    policy = adacache.MagCache(ratios=RATIOS, cache=cache)
    assert policy.schedule(STEPS) == computed
    check_schedule(case, policy, computed, last)


@pytest.mark.parametrize("threshold", [0.06, 0.3])
def test_magcache_matches_diffusers(threshold: float) -> None:
    """The retention is a multiple of 1 / STEPS, so that both implementations round to the same step."""
    from diffusers.hooks import MagCacheConfig, apply_mag_cache

    case, retention = WAN, 3 / STEPS
    model, values, clock = case.model(), case.values(seed=4), Clock()
    config = MagCacheConfig(
        threshold=threshold,
        max_skip_steps=3,
        retention_ratio=retention,
        num_inference_steps=STEPS,
        mag_ratios=RATIOS,
    )
    apply_mag_cache(model, config)
    steps = steps_of(case.blocks(model)[1][1], "fn_ref", clock)
    with model.cache_context("cond"):
        expected = run_slowly(case, model, values, clock)
    model = case.model()
    policy = adacache.MagCache(ratios=RATIOS, threshold=threshold, most=3, retention=retention)
    with enabled(model, policy, STEPS) as handle:
        final = case.denoise(model, values, STEPS)
    assert handle.trace.computed_steps == steps
    assert 1 < len(steps) < STEPS
    assert relative_error(final, expected) < 1e-5


def test_magcache_ratios_match_diffusers(capsys: pytest.CaptureFixture[str]) -> None:
    import ast

    from diffusers.hooks import MagCacheConfig, apply_mag_cache

    case = WAN
    model, values = case.model(), case.values(seed=4)
    apply_mag_cache(model, MagCacheConfig(calibrate=True, num_inference_steps=STEPS))
    with model.cache_context("cond"):
        run_slowly(case, model, values, Clock())
    theirs = ast.literal_eval(capsys.readouterr().out.strip().splitlines()[-1])
    model = case.model()
    with enabled(model, adacache.MagRatios(), STEPS) as handle:
        case.denoise(model, values, STEPS)
    assert handle.trace.computed_steps == list(range(1, STEPS + 1))
    assert adacache.MagRatios.ratios(handle.trace) == pytest.approx(theirs, rel=1e-4)
    twice = adacache.MagRatios.ratios(handle.trace, handle.trace)
    assert twice == pytest.approx(theirs, rel=1e-4)


# Delta-DiT.


@pytest.mark.parametrize(("blocks", "gate", "interval"), [(1, 7, 2), (2, 5, 3), (2, 0, 4), (1, 14, 3)])
def test_delta_dit_follows_its_rule(case: Case, blocks: int, gate: int, interval: int) -> None:
    model, inputs, clock = case.model(), case.values(2), Clock()
    depth = len(case.blocks(model))
    kept: dict[tuple[int, int], Tensor] = {}
    ran: dict[int, int] = {}

    def rule(position: int, before: list[Tensor], after: list[Tensor]) -> list[Tensor]:
        full = clock.step % interval == 1
        rear = clock.step <= gate
        skipped = position >= depth - blocks if rear else position < blocks
        ran[clock.step] = ran.get(clock.step, 0) + (full or not skipped)
        found = []
        for k, (x, y) in enumerate(zip(before, after, strict=True)):
            if full or not skipped:
                kept[position, k] = y - x
            found.append(y if full or not skipped else x + kept[position, k])
        return found

    with blocks_replaced(case, model, rule):
        expected = run_slowly(case, model, inputs, clock)
    assert relative_error(run_slowly(case, model, inputs, Clock()), expected) > 1e-3, "no reuse"
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    hooks = [block.register_forward_pre_hook(count) for _, block in case.blocks(model)]
    with enabled(model, adacache.DeltaDiT(blocks, gate, interval), STEPS):
        final = case.denoise(model, inputs, STEPS)
    for hook in hooks:
        hook.remove()
    assert relative_error(final, expected) < case.tolerance
    assert calls == sum(ran.values())


# DBCache.


def dbcache_slowly(
    case: Case, model: nn.Module, inputs: dict[str, Any], policy: adacache.DBCache
) -> tuple[Tensor, list[int]]:
    clock, computed, features = Clock(), [], {}
    probe: dict[str, Tensor] = {}
    depth = len(case.blocks(model))

    def forecast(values: Values, step: int) -> Tensor:
        feature, steps = values.value[values.computed[-1]], values.computed
        if policy.order == 0 or len(steps) == 1:
            return feature
        slope = (feature - values.value[steps[-2]]) / (steps[-1] - steps[-2])
        return feature + slope * (step - steps[-1])

    def rule(position: int, before: list[Tensor], after: list[Tensor]) -> list[Tensor]:
        if position == 0:
            probe["start"] = before[0]
        if position == policy.probe - 1:
            residual = (after[0] - probe["start"]).double()
            reuse = clock.step > policy.first
            if reuse:
                change = float((residual - probe["kept"]).abs().mean() / probe["kept"].abs().mean())
                reuse = change < policy.threshold
            if not reuse:
                probe["kept"] = residual
                computed.append(clock.step)
        if not policy.probe <= position < depth - policy.tail:
            return after
        found = []
        for k, (x, y) in enumerate(zip(before, after, strict=True)):
            values = features.setdefault((position, k), Values(forecast))
            own = computed[-1] == clock.step
            new = values.at(clock.step, y - x if own else None)
            found.append(y if own else x + new.float())
        return found

    with blocks_replaced(case, model, rule):
        return run_slowly(case, model, inputs, clock), computed


@pytest.mark.parametrize(
    ("probe", "tail", "first", "order"), [(1, 1, 3, 0), (2, 0, 1, 0), (2, 1, 4, 1), (1, 0, 2, 1)]
)
def test_dbcache_follows_its_rule(case: Case, probe: int, tail: int, first: int, order: int) -> None:
    """A batch of videos against reference loops of single videos."""
    model, inputs = case.model(), mixed_values(case)
    threshold = {WAN.name: 0.35, COGVIDEOX.name: 0.9}[case.name]
    policy = adacache.DBCache(probe, tail, threshold, first=first, order=order)
    with enabled(model, policy, STEPS) as handle:
        final = case.denoise(model, inputs, STEPS)
    schedules = set()
    for video in range(3):
        expected, computed = dbcache_slowly(case, model, case.rows(inputs, video), policy)
        schedules.add(tuple(computed))
        assert handle.trace.steps_of(video) == computed
        assert computed[:first] == list(range(1, first + 1))
        assert relative_error(final[video], expected[0]) < case.tolerance
    assert any(first < len(steps) < STEPS for steps in schedules)


@pytest.mark.parametrize(("probe", "tail", "first"), [(1, 0, 3), (1, 1, 3), (2, 0, 1)])
def test_dbcache_matches_cache_dit(case: Case, probe: int, tail: int, first: int) -> None:
    cache_dit = pytest.importorskip("cache_dit")
    threshold = {WAN.name: 0.35, COGVIDEOX.name: 0.6}[case.name]
    model, values, clock, ran = case.model(), case.values(seed=4), Clock(), []
    pattern = cache_dit.ForwardPattern
    hook = case.blocks(model)[probe][1].register_forward_pre_hook(lambda *_: ran.append(clock.step))
    cache_dit.enable_cache(
        cache_dit.BlockAdapter(
            transformer=model,
            blocks=getattr(model, case.lists[0]),
            forward_pattern=pattern.Pattern_2 if case is WAN else pattern.Pattern_0,
            check_forward_pattern=False,
        ),
        cache_config=cache_dit.DBCacheConfig(
            Fn_compute_blocks=probe,
            Bn_compute_blocks=tail,
            max_warmup_steps=first,
            residual_diff_threshold=threshold,
            num_inference_steps=STEPS,
            enable_separate_cfg=False,
        ),
    )
    expected = run_slowly(case, model, values, clock)
    hook.remove()
    model = case.model()
    with enabled(model, adacache.DBCache(probe, tail, threshold, first=first), STEPS) as handle:
        final = case.denoise(model, values, STEPS)
    assert handle.trace.computed_steps == ran
    assert first < len(ran) < STEPS
    assert torch.equal(final, expected)


# MeanCache.


@pytest.mark.parametrize("span", [1, 2, 3])
@pytest.mark.parametrize("even", [True, False])
def test_meancache_follows_its_rule(span: int, even: bool) -> None:
    """The latents of an Euler loop are the path z of the rule."""
    case, computed = WAN, [1, 2, 3, 6, 7, 9, 13]
    model, inputs = case.model(), case.values(2)
    times = [1 - step / STEPS for step in range(STEPS + 1)]
    if not even:
        times = [time**1.5 for time in times]

    def denoise(velocity: Callable[[int, Tensor], Tensor]) -> Tensor:
        z = inputs[case.latents]
        with torch.no_grad():
            for step in range(STEPS):
                z = z + (times[step + 1] - times[step]) * velocity(step, z)
        return z

    kept: list[tuple[float, Tensor, Tensor]] = []

    def rule(step: int, z: Tensor) -> Tensor:
        if step + 1 in computed:
            kept.append((times[step], z.double(), case.predict(model, inputs, z, step, STEPS).double()))
            return kept[-1][2].float()
        t, z_t, v = kept[-1]
        if len(kept) == 1:
            return v.float()
        r, z_r, v_r = kept[max(-1 - span, -len(kept))]
        return (v + (times[step] - t) * (z_t - z_r - (t - r) * v_r) / (t - r) ** 2).float()

    expected = denoise(rule)
    policy = adacache.MeanCache(computed=computed, span=span, times=None if even else times)
    with enabled(model, policy, STEPS) as handle:
        final = denoise(lambda step, z: case.predict(model, inputs, z, step, STEPS))
    assert handle.trace.computed_steps == computed
    assert relative_error(final, expected) < case.tolerance
    with enabled(model, adacache.DPCache(computed=computed, order=0, cache="branch"), STEPS):
        held = denoise(lambda step, z: case.predict(model, inputs, z, step, STEPS))
    # With one step from r to t, an Euler path gives no correction.
    assert (relative_error(held, expected) > 1e-3) == (span > 1)


# T-GATE.


@pytest.mark.parametrize("settings", [{}, {"gate": 6, "interval": 3, "warm_up": 1, "after": 2}])
def test_tgate_follows_its_rule(settings: dict[str, Any]) -> None:
    case, policy = WAN, adacache.TGATE(**settings)
    model, inputs, clock = case.model(), case.values(2), Clock()
    computed: dict[str, list[int]] = {"attention": [], "cross_attention": []}
    for step in range(STEPS):  # from 0, as published
        if step == policy.gate - 1:
            own = ["attention", "cross_attention"]
        elif step < policy.gate:
            early = step < policy.warm_up or step % policy.interval == 0
            own = ["cross_attention", *(["attention"] if early else [])]
        else:
            own = ["attention"] if step % policy.after == 0 else []
        for part in own:
            computed[part].append(step + 1)

    def keep(part: str) -> Callable[[Any], Any]:
        kept: list[Any] = []

        def change(output: Any) -> Any:
            if clock.step in computed[part]:
                kept[:] = [output.clone()]
            return kept[0]

        return change

    changes = {child: keep(part) for part in computed for child in children(case, model, part)}
    with replaced(changes):
        expected = run_slowly(case, model, inputs, clock)
    assert not torch.equal(run_slowly(case, model, inputs, Clock()), expected), "no reuse"
    with enabled(model, policy, STEPS):
        assert torch.equal(case.denoise(model, inputs, STEPS), expected)


def test_tgate_needs_cross_attention() -> None:
    with pytest.raises(ValueError, match="model: T-GATE needs a sub-layer 'cross_attention', this model has"):
        adacache.enable(COGVIDEOX.model(), adacache.TGATE(), num_steps=STEPS)


# Limits.


@pytest.mark.parametrize(
    ("limits", "computed"),
    [
        ({"first": 3, "last": 2}, [1, 2, 3, 6, 11, 13, 14]),
        ({"most": 2}, [1, 4, 6, 9, 11, 14]),
        ({"mask": [i in (3, 8) for i in range(1, STEPS + 1)]}, [1, 3, 6, 8, 11]),
        ({}, [1, 6, 11]),
    ],
)
def test_limits_of_a_schedule(limits: dict[str, Any], computed: list[int]) -> None:
    """Forecasts use the steps that are computed under the limits."""
    case = WAN
    model, inputs = case.model(), case.values(2)
    for inner, same in (
        (adacache.TaylorSeer(order=2), adacache.DPCache(computed=computed, order=2)),
        (adacache.Interval(cache="branch"), adacache.DPCache(computed=computed, order=0, cache="branch")),
    ):
        with enabled(model, adacache.Limits(inner, **limits), STEPS) as handle:
            final = case.denoise(model, inputs, STEPS)
        assert handle.trace.computed_steps == computed
        with enabled(model, same, STEPS):
            assert torch.equal(case.denoise(model, inputs, STEPS), final)
    assert handle.trace.policy["policy"] == "Interval"
    assert handle.trace.policy["limits"]["most"] == limits.get("most")


def test_limits_of_decisions() -> None:
    """Equal to a method with the same limits as settings, for each video of a batch."""
    case = WAN
    model, inputs = case.model(), mixed_values(case)
    for inner, limits, same in (
        (
            adacache.SeaCache(0.15, most=99),
            {"first": 3, "last": 4, "most": 1},
            adacache.SeaCache(0.15, first=3, last=4, most=1),
        ),
        (
            adacache.DBCache(1, 0, 0.35, first=1, order=1),
            {"first": 4},
            adacache.DBCache(1, 0, 0.35, first=4, order=1),
        ),
        (adacache.TeaCache(threshold=1.0), {"first": 5}, adacache.TeaCache(threshold=1.0, first=5)),
        (adacache.DiCache(0.25), {"last": 3}, adacache.DiCache(0.25, last=3)),
    ):
        with enabled(model, inner, STEPS) as handle:
            case.denoise(model, inputs, STEPS)
        free = [handle.trace.steps_of(video) for video in range(3)]
        with enabled(model, same, STEPS) as handle:
            expected = case.denoise(model, inputs, STEPS)
        schedules = [handle.trace.steps_of(video) for video in range(3)]
        assert schedules != free
        with enabled(model, adacache.Limits(inner, **limits), STEPS) as handle:
            assert torch.equal(case.denoise(model, inputs, STEPS), expected)
        assert [handle.trace.steps_of(video) for video in range(3)] == schedules


def test_invalid_limits() -> None:
    model = WAN.model()
    with pytest.raises(ValueError, match="policy: expected settings of a method, got str"):
        adacache.Limits("pab/latte")
    with pytest.raises(ValueError, match="mask: expected 14 values, one per step, got 2"):
        adacache.enable(model, adacache.Limits(adacache.Interval(), mask=[True, False]), num_steps=STEPS)
    path = adacache.Limits(adacache.PlannedPath([1, 2, 5], [0.0, 1.0, 1.0], level="branch"), first=3)
    with (
        enabled(model, path, STEPS),
        pytest.raises(ValueError, match="policy: PlannedPath forecasts from a schedule of its own"),
    ):
        WAN.denoise(model, WAN.values(), STEPS)


# All policies.


def all_policies() -> list[Any]:
    path = [1, 2, 3, 6, 9, 12]
    return [
        adacache.Interval(3),
        adacache.FoCa(interval=3, first=2),
        adacache.Spectrum(first=3),
        adacache.DPCache(computed=path),
        adacache.MeanCache(computed=path),
        adacache.MagCache(ratios=RATIOS),
        adacache.DeltaDiT(1, 7),
        adacache.DBCache(1, 1, 0.5, first=2, order=1),
        adacache.TeaCache(threshold=1.0),
        adacache.EasyCache(0.6, first=3),
        adacache.SeaCache(0.2),
        adacache.SenCache([0.5], [1e-4], threshold=0.3),
        adacache.DiCache(0.3),
        adacache.BWCache(0.4, 0.2),
        adacache.TGATE(gate=6),
        adacache.Limits(adacache.Spectrum(first=2), most=2),
    ]


@pytest.mark.parametrize("policy", all_policies(), ids=lambda policy: type(policy).__name__)
def test_requests_are_independent(policy: Any) -> None:
    case = WAN
    model, values, other = case.model(), case.values(), case.values(2, seed=5)
    before = {name: type(module) for name, module in model.named_modules()}
    plain = case.denoise(model, values, STEPS)
    with enabled(model, policy, STEPS) as handle:
        with handle.request():
            expected = case.denoise(model, values, STEPS)
        assert not torch.equal(expected, plain), "no reuse"
        with handle.request(num_videos=2):
            case.denoise(model, other, STEPS)
        assert torch.equal(case.denoise(model, values, STEPS), expected), "outside a request"
        calls = 0

        def fail(*_: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == 3:
                raise KeyboardInterrupt("interrupted")

        hook = case.blocks(model)[0][1].register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt), handle.request():
            case.denoise(model, case.rows(other, 1), STEPS)
        hook.remove()
        with handle.request():
            assert torch.equal(case.denoise(model, values, STEPS), expected)
        trace = handle.trace
        assert trace.policy["policy"] == type(getattr(policy, "policy", policy)).__name__
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert not any("adacache" in name for module in model.modules() for name in module.__dict__)
    assert torch.equal(case.denoise(model, values, STEPS), plain)


@pytest.mark.parametrize("policy", all_policies(), ids=lambda policy: type(policy).__name__)
def test_half_precision_and_traces(policy: Any, tmp_path: Any) -> None:
    case = WAN
    model = case.model().to(torch.bfloat16)
    values = {
        name: value.to(torch.bfloat16) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in case.values().items()
    }
    plain = case.denoise(model, values, STEPS)
    with enabled(model, policy, STEPS) as handle:
        final = case.denoise(model, values, STEPS)
    assert final.dtype == plain.dtype
    assert 0 < relative_error(final, plain) < 1.0
    handle.trace.save(tmp_path / "trace.json")
    assert adacache.Trace.load(tmp_path / "trace.json") == handle.trace


def test_guidance_in_two_calls() -> None:
    """The second call uses the decisions of the first and its own tensors."""
    case = WAN
    model, values, null = case.model(), case.values(seed=1), case.values(seed=2)
    for policy in all_policies():
        if isinstance(policy, adacache.MeanCache | adacache.EasyCache):
            continue  # one decision per batch, or another sampler path
        with enabled(model, policy, STEPS) as handle, handle.request(branches=2):
            final = case.denoise_in_two_calls(model, values, null, STEPS, context=False)
        computed = handle.trace.computed_steps
        with enabled(model, policy, STEPS) as handle:
            again = case.denoise_in_two_calls(model, values, null, STEPS, context=False)
        assert torch.equal(final, again), "outside a request"
        assert handle.trace.computed_steps == computed


@pytest.mark.parametrize("policy", [adacache.Spectrum(first=3), adacache.FoCa(interval=4, first=3)])
def test_a_recurrence_after_a_change_of_shape(policy: Any) -> None:
    """A prompt of another length forces a computed step and drops the kept tensors. Skipped steps after it
    hold the last computed feature."""
    case, changed_at = COGVIDEOX, 5
    model, values, clock = case.model(), case.values(2), Clock()
    planned = computed_by(policy)
    later = {**values, "encoder_hidden_states": values["encoder_hidden_states"][:, :3]}
    rule = spectrum(policy, STEPS) if isinstance(policy, adacache.Spectrum) else foca(None)
    features: dict[Any, Values] = {}

    def hold(position: int, before: list[Tensor], after: list[Tensor]) -> list[Tensor]:
        found = []
        for k, (x, y) in enumerate(zip(before, after, strict=True)):
            shape = after[1].shape  # of the text tokens
            own = features.setdefault((position, k, shape), Values(rule if shape[1] == 5 else last))
            new = y - x if clock.step in planned or not own.computed else None
            value = own.at(clock.step, new)
            found.append(y if new is not None else x + value.float())
        return found

    def denoise() -> Tensor:
        z = values[case.latents]
        with torch.no_grad():
            for step in range(STEPS):
                clock.step = step + 1
                z = (
                    z
                    - case.predict(model, values if clock.step < changed_at else later, z, step, STEPS)
                    / STEPS
                )
        return z

    with blocks_replaced(case, model, hold):
        expected = denoise()
    with enabled(model, policy, STEPS) as handle, handle.request(num_videos=1):
        final = denoise()
    assert handle.trace.computed_steps == sorted({*planned, changed_at})
    assert relative_error(final, expected) < case.tolerance


def test_guided_outputs_in_a_pipeline() -> None:
    """The same as a planned path that continues its outputs linearly."""
    from pipeline_cases import PIPELINES

    path, steps = [1, 2, 4, 7, 12], 12
    case = next(one for one in PIPELINES if str(one) == "WanPipeline")
    found = []
    for policy in (
        adacache.PlannedPath(path, [1.0] * len(path), "guided"),
        adacache.DPCache(computed=path, order=1, cache="guided"),
    ):
        torch.manual_seed(0)
        pipeline = case.build()
        handle = adacache.enable(pipeline, policy)
        found.append(case.generate(pipeline, steps))
        assert handle.trace.computed_steps == path
    assert relative_error(*found) < 1e-6
    torch.manual_seed(0)
    assert relative_error(case.generate(case.build(), steps), found[0]) > 1e-3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: adacache.Interval(0), "interval: expected a whole number of at least 1, got 0"),
        (lambda: adacache.Interval(cache="all"), r"cache: expected one of \['stack', .*\], got 'all'"),
        (lambda: adacache.FoCa(horizon=0), "horizon: expected a whole number of at least 1, got 0"),
        (lambda: adacache.FoCa(cache_dtype=torch.float8_e4m3fn), "cache_dtype: .* factors of a forecast"),
        (lambda: adacache.Spectrum(degree=15), r"degree: expected a whole number in 0\.\.14, got 15"),
        (lambda: adacache.Spectrum(ridge=0), "ridge: expected a number above 0, got 0"),
        (lambda: adacache.Spectrum(window=0.5), "window: expected a number of at least 1, got 0.5"),
        (
            lambda: adacache.DPCache(computed=[2, 3]),
            r"computed: expected steps that rise from 1, got \[2, 3\]",
        ),
        (lambda: adacache.DPCache(computed=[1], order=4), r"order: expected a whole number in 0\.\.3, got 4"),
        (lambda: adacache.MeanCache(computed=[1, 3], cache="stack"), "cache: expected 'branch' or 'guided'"),
        (
            lambda: adacache.MeanCache(computed=[1], times=[1, 0, 2]),
            "times: expected times that rise or fall",
        ),
        (lambda: adacache.MagCache(ratios=[]), "ratios: expected a list of 1 or more items"),
        (lambda: adacache.MagCache(ratios=[0.0]), r"ratios\[0\]: expected a number above 0, got 0"),
        (lambda: adacache.MagRatios.ratios(), "traces: expected at least one"),
        (lambda: adacache.DeltaDiT(0, 3), "blocks: expected a whole number of at least 1, got 0"),
        (lambda: adacache.DBCache(probe=0), "probe: expected a whole number of at least 1, got 0"),
        (
            lambda: adacache.DBCache(order=1, cache_dtype=torch.float8_e4m3fn),
            "cache_dtype: .* with order > 0, got float8_e4m3fn",
        ),
        (lambda: adacache.TeaCache(coefficients=[]), "coefficients: expected a list of 1 or more items"),
        (lambda: adacache.TeaCache(threshold=0), "threshold: expected a number above 0, got 0"),
        (lambda: adacache.EasyCache(first=1), "first: expected a whole number of at least 2, got 1"),
        (lambda: adacache.SeaCache(order=2), r"order: expected a whole number in 0\.\.1, got 2"),
        (lambda: adacache.SenCache([], [1.0]), "latents: expected a list of 1 or more items"),
        (lambda: adacache.DiCache(0.1, error="both"), "error: expected one of difference, probe, got 'both'"),
        (lambda: adacache.BWCache(share=1.5), r"share: expected a number in 0\.\.1, got 1.5"),
        (lambda: adacache.TGATE(gate=0), "gate: expected a whole number of at least 1, got 0"),
        (
            lambda: adacache.Limits(adacache.Interval(), most=-1),
            "most: expected a whole number of at least 0",
        ),
    ],
)
def test_settings_are_checked(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (adacache.DBCache(), "probe, tail: expected fewer than 4 blocks together, got 8 \\+ 0"),
        (adacache.DeltaDiT(3, 1), "blocks: expected at most 2, half of the model's 4 blocks, got 3"),
        (adacache.DiCache(0.1, probe=4), "probe: expected fewer than 4 blocks, got 4"),
        (adacache.DPCache(computed=[1, 15]), "num_steps: the path computes step 15, got a schedule of 14"),
        (adacache.MeanCache(computed=[1, 2], times=[1, 0]), "times: expected 14, one per step, got 2"),
        (adacache.TeaCache(cache="sublayer"), "cache: this model supports"),
        (adacache.Interval(cache="output", parts=["none"]), "parts: expected some of the model's sub-layers"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_settings_must_fit_the_model(policy: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adacache.enable(WAN.model(), policy, num_steps=STEPS)


def test_presets_are_published_settings() -> None:
    names = adacache.preset_names()
    assert len(names) == len(set(names))
    assert adacache.preset("teacache/open-sora-fast", 30) == adacache.TeaCache(
        (217.546007, -118.329252, 26.8662585, -0.0459364272, 0.048442624), 0.2
    )
    assert adacache.preset("dbcache/f8b0", None) == adacache.DBCache(8, 0, 0.08, first=8)
    assert adacache.preset("taylorseer/video", 50) == adacache.TaylorSeer(5, order=1, cache="output")
    assert adacache.preset("pab/latte", 50).window == (100, 800)
    model, values = WAN.model(), WAN.values()
    with enabled(model, "taylorseer/video", STEPS) as handle:
        WAN.denoise(model, values, STEPS)
    assert handle.trace.policy["policy"] == "TaylorSeer"
    with pytest.raises(ValueError, match="budget: expected None, because taylorseer/video has no planned"):
        adacache.enable(model, "taylorseer/video", num_steps=STEPS, budget=3)

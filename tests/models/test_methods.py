# SPDX-License-Identifier: Apache-2.0
"""PAB, FirstBlock and TaylorSeer on models of diffusers, against reference implementations with hooks on a
plain model, and against the hooks of diffusers."""

from __future__ import annotations

import contextlib
import inspect
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import adacache
import pytest
import torch
from adacache.adapters.spec import BlockList, ModelSpec
from model_cases import COGVIDEOX, HUNYUAN, LATTE, LTX, WAN, Case, ids, relative_error
from test_models import enabled
from torch import Tensor, nn

pytest.importorskip("diffusers", reason="diffusers is not installed")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

STEPS = 14
CHILDREN: dict[str, dict[str, str]] = {
    WAN.name: {
        "attention": r"blocks\.\d+\.attn1",
        "cross_attention": r"blocks\.\d+\.attn2",
        "mlp": r"blocks\.\d+\.ffn",
    },
    COGVIDEOX.name: {"attention": r"transformer_blocks\.\d+\.attn1", "mlp": r"transformer_blocks\.\d+\.ff"},
    LATTE.name: {
        "spatial_attention": r"transformer_blocks\.\d+\.attn1",
        "cross_attention": r"transformer_blocks\.\d+\.attn2",
        "temporal_attention": r"temporal_transformer_blocks\.\d+\.attn1",
        "mlp": r"(temporal_)?transformer_blocks\.\d+\.ff",
    },
    HUNYUAN.name: {
        "attention": r"(single_)?transformer_blocks\.\d+\.attn",
        "mlp": r"transformer_blocks\.\d+\.ff",
    },
}
"""Per model and sub-layer, a pattern of the children whose output is kept."""
THRESHOLDS = {WAN.name: 0.3, COGVIDEOX.name: 0.9, LATTE.name: 0.5, HUNYUAN.name: 0.5, LTX.name: 0.4}
"""Thresholds that give nontrivial schedules of FirstBlock."""
CHECKED = [WAN, COGVIDEOX, LATTE, HUNYUAN]
"""The cases of tests with a `case` argument, see conftest.py."""


def children(case: Case, model: nn.Module, part: str) -> list[nn.Module]:
    found = [child for name, child in model.named_modules() if re.fullmatch(CHILDREN[case.name][part], name)]
    assert found
    return found


@contextlib.contextmanager
def replaced(outputs: dict[nn.Module, Callable[[Any], Any]]) -> Iterator[None]:
    """Replaces outputs of modules of a plain model; the modules still run."""
    hooks = [
        module.register_forward_hook(lambda _, args, output, change=change: change(output))
        for module, change in outputs.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class Clock:
    """The step (1-based) and the timestep of a loop on a plain model."""

    step: int = 0
    time: float = 0.0


def run_slowly(case: Case, model: nn.Module, values: dict[str, Any], clock: Clock) -> Tensor:
    z = values[case.latents]
    with torch.no_grad():
        for step in range(STEPS):
            clock.step, clock.time = step + 1, case.schedule * (1 - step / STEPS)
            z = z - case.predict(model, values, z, step, STEPS) / STEPS
    return z


def tensors(value: Any) -> tuple[Tensor | None, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)


def like(value: Any, changed: Sequence[Any]) -> Any:
    """`changed` as a tensor or a tuple, like `value`."""
    return changed[0] if isinstance(value, Tensor) else tuple(changed)


@dataclass
class Forecast:
    """A feature at the computed steps, and its forecast by Newton's divided differences."""

    order: int
    steps: list[int] = field(default_factory=list)
    table: list[list[Tensor]] = field(default_factory=list)
    """The factors of each computed step."""

    def add(self, step: int, feature: Tensor) -> None:
        factors = [feature.double()]
        if self.steps:
            for old in self.table[-1][: self.order]:
                factors.append((factors[-1] - old) / (step - self.steps[-1]))
        self.steps.append(step)
        self.table.append(factors)

    def at(self, step: int) -> Tensor:
        ahead = step - self.steps[-1]
        terms = [factor * ahead**i / math.factorial(i) for i, factor in enumerate(self.table[-1])]
        return sum(terms[1:], terms[0])


def streams_of(case: Case, block: nn.Module, args: Any, kwargs: Any) -> list[Tensor]:
    names = list(inspect.signature(block.forward).parameters)
    given = dict(zip(names, args, strict=False)) | kwargs
    return [given[name] for name in case.streams]


@contextlib.contextmanager
def blocks_replaced(
    case: Case, model: nn.Module, rule: Callable[[int, list[Tensor], list[Tensor]], list[Tensor]]
) -> Iterator[None]:
    """Replaces the outputs of blocks by rule(position, streams before, streams after)."""

    def after(position: int) -> Callable[..., Any]:
        def hook(block: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            before = streams_of(case, block, args, kwargs)
            return like(output, rule(position, before, list(tensors(output))))

        return hook

    hooks = [
        block.register_forward_hook(after(position), with_kwargs=True)
        for position, (_, block) in enumerate(case.blocks(model))
    ]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


# PAB.


@pytest.mark.parametrize("mlp", [False, True])
@pytest.mark.sampled(2)
def test_pab_follows_its_rule(case: Case, mlp: bool) -> None:
    model, values = case.model(), case.values(2)
    ranges = {**adacache.PAB.FAST, **({"mlp": 3} if mlp else {})}
    low, high = 100, 800
    clock = Clock()
    reused = 0

    def broadcast(count: int) -> Callable[[Any], Any]:
        kept: Any = None

        def change(output: Any) -> Any:
            nonlocal kept, reused
            if (clock.step - 1) % count and low < clock.time < high:
                reused += 1
            else:
                kept = like(output, [x.clone() for x in tensors(output)])
            return kept

        return change

    changes = {
        child: broadcast(ranges[part])
        for part in CHILDREN[case.name]
        if part in ranges
        for child in children(case, model, part)
    }
    with replaced(changes):
        expected = run_slowly(case, model, values, clock)
    assert reused > 0
    assert not torch.equal(run_slowly(case, model, values, clock), expected), "reuse must affect the result"
    with enabled(model, adacache.PAB(ranges, window=(low, high)), STEPS) as handle:
        final = case.denoise(model, values, STEPS)
    assert torch.equal(final, expected)
    assert handle.trace.computed_steps == list(range(1, STEPS + 1))
    assert torch.equal(case.denoise(model, values, STEPS), run_slowly(case, model, values, clock))


@pytest.mark.sampled(2)
def test_pab_runs_no_child_that_it_reuses(case: Case) -> None:
    model, values = case.model(), case.values()
    ranges = {part: 2 + i for i, part in enumerate(CHILDREN[case.name])}
    calls = dict.fromkeys(ranges, 0)

    def count(part: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            calls[part] += 1

        return hook

    expected = {}
    for part, each in ranges.items():
        found = children(case, model, part)
        expected[part] = len(found) * math.ceil(STEPS / each)
        for child in found:
            child.register_forward_pre_hook(count(part))
    with enabled(model, adacache.PAB(ranges, window=(0, 2000)), STEPS):
        case.denoise(model, values, STEPS)
    assert calls == expected


@pytest.mark.sampled(2)
def test_pab_in_two_calls(case: Case) -> None:
    """Outputs are kept per guidance branch, so the result equals that of guidance in one batch."""
    model, values, null = case.model(), case.values(seed=1), case.values(seed=2)
    policy = adacache.PAB({**adacache.PAB.FAST, "mlp": 3}, window=(100, 900))
    with enabled(model, policy, STEPS):
        final = case.denoise_in_two_calls(model, values, null, STEPS, context=False)
    with enabled(model, policy, STEPS, rows_per_video=2):
        expected = denoise_in_one_batch(case, model, values, null)
    assert relative_error(final, expected) < case.tolerance


def denoise_in_one_batch(case: Case, model: nn.Module, values: Any, null: Any) -> Tensor:
    both = {
        name: torch.cat((value, null[name]))
        if isinstance(value, Tensor) and name not in case.shared and value.shape[:1] == (1,)
        else value
        for name, value in values.items()
    }
    z = values[case.latents]
    with torch.no_grad():
        for step in range(STEPS):
            conditional, unconditional = case.predict(model, both, torch.cat((z, z)), step, STEPS).chunk(2)
            z = z - (unconditional + 2.0 * (conditional - unconditional)) / STEPS
    return z


@pytest.mark.parametrize("model_case", [WAN, LATTE, COGVIDEOX], ids=ids)
def test_pab_matches_diffusers(model_case: Case) -> None:
    from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

    case = model_case
    model, values, clock = case.model(), case.values(2), Clock()
    window = (100, 800)
    ranges = {"spatial_attention": 2, "attention": 2, "temporal_attention": 3, "cross_attention": 5}
    apply_pyramid_attention_broadcast(
        model,
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            temporal_attention_block_skip_range=3 if case is LATTE else None,
            cross_attention_block_skip_range=5,
            spatial_attention_timestep_skip_range=window,
            temporal_attention_timestep_skip_range=window,
            cross_attention_timestep_skip_range=window,
            current_timestep_callback=lambda: clock.time,
        ),
    )
    if case is LATTE:  # diffusers treats all attention in "transformer_blocks" as spatial
        ranges["temporal_attention"] = 2
    expected = run_slowly(case, model, values, clock)
    model = case.model()
    with enabled(model, adacache.PAB(ranges, window=window), STEPS):
        assert torch.equal(case.denoise(model, values, STEPS), expected)
    assert not torch.equal(case.denoise(model, values, STEPS), expected)


def test_pab_warns_if_no_timestep_is_in_the_window() -> None:
    """For example with timesteps in 0..1."""
    model, values = WAN.model(), WAN.values()
    with (
        enabled(model, adacache.PAB(window=(0.45, 0.93)), STEPS),
        pytest.warns(UserWarning, match=r"PAB reused nothing.*window=\(0.45, 0.93\)"),
    ):
        WAN.denoise(model, values, STEPS)


class InPlace(nn.Module):
    """A model with two blocks that scale the output of a sub-layer, optionally in place."""

    def __init__(self, in_place: bool):
        super().__init__()
        self.transformer_blocks = nn.ModuleList(InPlaceBlock(in_place) for _ in range(2))

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        for block in self.transformer_blocks:
            hidden_states = block(hidden_states)
        return hidden_states


class InPlaceBlock(nn.Module):
    def __init__(self, in_place: bool):
        super().__init__()
        self.attn = nn.Linear(8, 8)
        self.in_place = in_place

    def forward(self, hidden_states: Tensor) -> Tensor:
        y = self.attn(hidden_states)
        y = y.mul_(3.0) if self.in_place else y * 3.0
        return hidden_states + y


def test_outputs_that_a_model_modifies_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a reused output was modified in place, it is recomputed once, and copied from then on."""
    lists = (BlockList("transformer_blocks", outputs={"attention": "attn"}),)
    spec = ModelSpec(("InPlace",), lists)
    monkeypatch.setattr("adacache.handle.spec_for", lambda model, blocks=True: (spec, True))
    torch.manual_seed(0)
    in_place, plain = InPlace(True).requires_grad_(False), InPlace(False).requires_grad_(False)
    plain.load_state_dict(in_place.state_dict())
    x = torch.randn(1, 5, 8)

    def denoise(model: nn.Module, clock: Clock) -> Tensor:
        z = x
        for step in range(STEPS):
            clock.step = step + 1
            z = z - model(z, torch.full((1,), 1000.0 - step)) / STEPS
        return z

    clock = Clock()

    def keep() -> Callable[[Any], Any]:
        kept: list[Tensor] = []

        def change(output: Tensor) -> Tensor:
            if clock.step == 3 or clock.step % 4 == 1:
                kept[:] = [output]
            return kept[0]

        return change

    with replaced({block.attn: keep() for block in plain.transformer_blocks}):
        expected = denoise(plain, clock)
    with enabled(in_place, adacache.PAB({"attention": 4}, window=(0, 2000)), STEPS):
        assert torch.equal(denoise(in_place, clock), expected)


# TaylorSeer.

SETTINGS = [
    {},
    {"order": 2, "interval": 3, "first": 2},
    {"order": 3, "interval": 2, "first": 4, "phase": 1, "last": 1},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("cache", ["stack", "block"])
@pytest.mark.sampled(2)
def test_taylorseer_forecasts_residuals(case: Case, cache: str, settings: dict[str, Any]) -> None:
    model, values, clock = case.model(), case.values(2), Clock()
    policy = adacache.TaylorSeer(cache=cache, **settings)
    forecasts: dict[tuple[int, int], Forecast] = {}

    def rule(position: int, before: list[Tensor], after: list[Tensor]) -> list[Tensor]:
        found = []
        for k, (x, y) in enumerate(zip(before, after, strict=True)):
            forecast = forecasts.setdefault((position, k), Forecast(policy.order))
            if policy.computes(adacache.policies.Step(clock.step, STEPS)):
                forecast.add(clock.step, y - x)
                found.append(y)
            else:
                found.append(x + forecast.at(clock.step).float())
        return found

    with blocks_replaced(case, model, rule):
        expected = run_slowly(case, model, values, clock)
    assert relative_error(run_slowly(case, model, values, clock), expected) > 1e-3, "no effect of forecasts"
    with enabled(model, policy, STEPS) as handle:
        final = case.denoise(model, values, STEPS)
    assert relative_error(final, expected) < case.tolerance
    assert 2 < len(handle.trace.computed_steps) < STEPS


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.sampled(2)
def test_taylorseer_forecasts_outputs(case: Case, settings: dict[str, Any]) -> None:
    model, values, clock = case.model(), case.values(2), Clock()
    parts = list(CHILDREN[case.name])[::-2]
    policy = adacache.TaylorSeer(cache="output", parts=parts, **settings)

    def forecast() -> Callable[[Any], Any]:
        history: dict[int, Forecast] = {}

        def change(output: Any) -> Any:
            found = []
            for k, y in enumerate(tensors(output)):
                own = history.setdefault(k, Forecast(policy.order))
                if policy.computes(adacache.policies.Step(clock.step, STEPS)):
                    own.add(clock.step, y)
                    found.append(y)
                else:
                    found.append(own.at(clock.step).float())
            return like(output, found)

        return change

    with replaced({child: forecast() for part in parts for child in children(case, model, part)}):
        expected = run_slowly(case, model, values, clock)
    assert relative_error(run_slowly(case, model, values, clock), expected) > 1e-3, "no effect of forecasts"
    with enabled(model, policy, STEPS):
        final = case.denoise(model, values, STEPS)
    assert relative_error(final, expected) < case.tolerance


@pytest.mark.parametrize(
    ("interval", "before", "order"), [(5, 3, 1), (3, 2, 2), (4, 4, 3), (2, 3, 1), (1, 3, 1)]
)
@pytest.mark.sampled(2)
def test_taylorseer_matches_diffusers(case: Case, interval: int, before: int, order: int) -> None:
    from diffusers.hooks import TaylorSeerCacheConfig, apply_taylorseer_cache

    model, values, clock = case.model(), case.values(), Clock()
    patterns = CHILDREN[case.name]
    config = TaylorSeerCacheConfig(
        cache_interval=interval,
        disable_cache_before_step=before,
        max_order=order,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=list(patterns.values()),
    )
    apply_taylorseer_cache(model, config)
    computed = {part: steps_of(children(case, model, part)[-1], "fn_ref", clock) for part in patterns}
    with context(model):
        expected = run_slowly(case, model, values, clock)
    model = case.model()
    policy = adacache.TaylorSeer(
        interval=interval, order=order, first=before, phase=2 % interval, cache="output"
    )
    with enabled(model, policy, STEPS):
        final = case.denoise(model, values, STEPS)
    assert relative_error(final, expected) < 1e-5
    steps = [step for step in range(1, STEPS + 1) if policy.computes(adacache.policies.Step(step, STEPS))]
    assert computed == dict.fromkeys(patterns, steps)


def steps_of(module: Any, attribute: str, clock: Clock) -> list[int]:
    """Records the steps at which a module hooked by diffusers runs."""
    steps: list[int] = []
    registry = module._diffusers_hook
    for name in registry._hook_order:
        fn_ref = getattr(registry.hooks[name], attribute)
        plain = fn_ref.original_forward

        def run(*args: Any, plain: Any = plain, **kwargs: Any) -> Any:
            steps.append(clock.step)
            return plain(*args, **kwargs)

        fn_ref.original_forward = run
    return steps


def context(model: Any) -> Any:
    return model.cache_context("cond") if hasattr(model, "cache_context") else contextlib.nullcontext()


# FirstBlock.


def first_block_slowly(
    case: Case, model: nn.Module, values: dict[str, Any], threshold: float
) -> tuple[Tensor, list[int], list[float]]:
    clock, computed, distances = Clock(), [], []
    kept: dict[tuple[int, int], Tensor] = {}

    def rule(position: int, before: list[Tensor], after: list[Tensor]) -> list[Tensor]:
        if position == 0:
            residual = (after[0] - before[0]).double()
            if clock.step > 1:
                distances.append(float((residual - kept[0, 0]).abs().mean() / kept[0, 0].abs().mean()))
            if clock.step == 1 or distances[-1] >= threshold:
                kept[0, 0] = residual
                computed.append(clock.step)
            return after
        if computed[-1] == clock.step:
            kept.update({(position, k): y - x for k, (x, y) in enumerate(zip(before, after, strict=True))})
            return after
        return [x + kept[position, k] for k, x in enumerate(before)]

    with blocks_replaced(case, model, rule):
        return run_slowly(case, model, values, clock), computed, distances


def mixed_values(case: Case) -> dict[str, Any]:
    """Inputs of three videos with different schedules."""
    values = case.values(3, seed=1)
    scale = torch.tensor([1.0, 4.0, 0.25]).view(3, *[1] * (values[case.latents].ndim - 1))
    return {**values, case.latents: values[case.latents] * scale}


@pytest.mark.sampled(2)
def test_first_block_follows_its_rule(case: Case) -> None:
    """Each video of a batch has the schedule and result of a separate run."""
    model, values = case.model(), mixed_values(case)
    threshold = THRESHOLDS[case.name]
    with enabled(model, adacache.FirstBlock(threshold), STEPS) as handle:
        final = case.denoise(model, values, STEPS)
    trace, schedules = handle.trace, set()
    for video in range(3):
        alone = case.rows(values, video)
        expected, computed, distances = first_block_slowly(case, model, alone, threshold)
        schedules.add(tuple(computed))
        assert trace.steps_of(video) == computed
        ((_, measured),) = trace.series("distance", video).items()
        assert [value for _, value in measured] == pytest.approx(distances, rel=1e-3)
        assert relative_error(final[video], expected[0]) < case.tolerance
    assert len(schedules) > 1, "the videos must differ"
    assert any(1 < len(steps) < STEPS for steps in schedules)


@pytest.mark.sampled(2)
def test_first_block_in_two_calls(case: Case) -> None:
    """The second call uses the decision of the first and its own residuals."""
    model, values, null = case.model(), case.values(seed=1), case.values(seed=2)
    policy = adacache.FirstBlock(THRESHOLDS[case.name])
    with enabled(model, policy, STEPS) as handle:
        final = case.denoise_in_two_calls(model, values, null, STEPS, context=False)
    computed = handle.trace.computed_steps
    assert 1 < len(computed) < STEPS
    clock = Clock()
    kept: dict[tuple[bool, int, int], Tensor] = {}
    calls = 0

    def rule(position: int, before: list[Tensor], after: list[Tensor]) -> list[Tensor]:
        second = calls % 2 == 0
        if position == 0:
            return after
        if clock.step in computed:
            pairs = enumerate(zip(before, after, strict=True))
            kept.update({(second, position, k): y - x for k, (x, y) in pairs})
            return after
        return [x + kept[second, position, k] for k, x in enumerate(before)]

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1
        clock.step = (calls + 1) // 2

    hook = model.register_forward_pre_hook(count)
    with blocks_replaced(case, model, rule):
        expected = case.denoise_in_two_calls(model, values, null, STEPS, context=False)
    hook.remove()
    assert relative_error(final, expected) < case.tolerance


@pytest.mark.parametrize("model_case", [WAN, COGVIDEOX, HUNYUAN, LTX], ids=ids)
@pytest.mark.parametrize("factor", [0.9, 1.0, 1.2])
def test_first_block_matches_diffusers(model_case: Case, factor: float) -> None:
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

    case = model_case
    model, values, clock = case.model(), case.values(seed=4), Clock()
    threshold = THRESHOLDS[case.name] * factor
    apply_first_block_cache(model, FirstBlockCacheConfig(threshold=threshold))
    steps = steps_of(case.blocks(model)[-1][1], "fn_ref", clock)
    with model.cache_context("cond"):
        expected = run_slowly(case, model, values, clock)
    model = case.model()
    with enabled(model, adacache.FirstBlock(threshold), STEPS) as handle:
        final = case.denoise(model, values, STEPS)
    assert handle.trace.computed_steps == steps
    assert 1 < len(steps) < STEPS
    assert relative_error(final, expected) < 1e-5


# All methods.


def policies(case: Case) -> list[Any]:
    return [
        adacache.PAB({**adacache.PAB.SLOW, "mlp": 2}, window=(100, 900)),
        adacache.TaylorSeer(),
        adacache.TaylorSeer(cache="block", order=2, interval=3),
        adacache.TaylorSeer(cache="output"),
        adacache.FirstBlock(THRESHOLDS[case.name]),
    ]


@pytest.mark.sampled(2)
def test_disable_restores_the_model(case: Case) -> None:
    model, values = case.model(), case.values(2)
    before = {name: type(module) for name, module in model.named_modules()}
    plain = case.denoise(model, values, STEPS)
    for policy in policies(case):
        with enabled(model, policy, STEPS):
            assert not torch.equal(case.denoise(model, values, STEPS), plain)
        assert {name: type(module) for name, module in model.named_modules()} == before
        assert not any("adacache" in name for module in model.modules() for name in module.__dict__)
        assert torch.equal(case.denoise(model, values, STEPS), plain)


@pytest.mark.sampled(2)
def test_requests_are_independent(case: Case) -> None:
    model, values, other = case.model(), case.values(), case.values(2, seed=5)
    for policy in policies(case):
        with enabled(model, policy, STEPS) as handle:
            with handle.request():
                expected = case.denoise(model, values, STEPS)
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


@pytest.mark.sampled(2)
def test_half_precision(case: Case) -> None:
    model = case.model().to(torch.bfloat16)
    values = {
        name: value.to(torch.bfloat16) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in case.values().items()
    }
    plain = case.denoise(model, values, STEPS)
    float8 = adacache.PAB(window=(100, 900), cache_dtype=torch.float8_e4m3fn)
    for policy in [*policies(case), float8]:
        with enabled(model, policy, STEPS):
            final = case.denoise(model, values, STEPS)
        assert final.dtype == plain.dtype
        assert 0 < relative_error(final, plain) < 1.0


@pytest.mark.sampled(2)
def test_computing_every_step_is_bit_identical(case: Case) -> None:
    model, values = case.model(), case.values(2)
    plain = case.denoise(model, values, STEPS)
    ones = dict.fromkeys(CHILDREN[case.name], 1)
    for policy in (
        adacache.PAB(ones),
        adacache.FirstBlock(1e-12),
        *(adacache.TaylorSeer(interval=1, cache=cache) for cache in ("stack", "block", "output")),
    ):
        with enabled(model, policy, STEPS):
            assert torch.equal(case.denoise(model, values, STEPS), plain)


@pytest.mark.parametrize("cache", ["stack", "output"])
@pytest.mark.parametrize("change", ["prompt", "rows"])
def test_forecasts_after_an_unplanned_computed_step(change: str, cache: str) -> None:
    """A change of prompt length, or disabled guidance, makes a step compute; its feature is reused until the
    next planned step. Differences are not taken across a change of shape."""
    case, changed_at = COGVIDEOX, 5
    model, values, clock = case.model(), case.values(2), Clock()
    policy = adacache.TaylorSeer(
        interval=4, order=2, first=3, cache=cache, parts=["attention"] if cache == "output" else None
    )
    planned = [step for step in range(1, STEPS + 1) if policy.computes(adacache.policies.Step(step, STEPS))]
    assert planned == [1, 2, 3, 7, 11]
    later = {**values, "encoder_hidden_states": values["encoder_hidden_states"][:, :3]}
    later = later if change == "prompt" else case.rows(values, 0)
    forecasts: dict[Any, Forecast] = {}

    def feature(key: Any, new: Tensor) -> Tensor:
        """The feature of this step. Each shape has a separate history."""
        forecast = forecasts.setdefault((key, new.shape), Forecast(policy.order))
        if clock.step in planned or clock.step == changed_at:
            forecast.add(clock.step, new)
            return new
        return (
            forecast.table[-1][0] if forecast.steps[-1] == changed_at else forecast.at(clock.step)
        ).float()

    def rule(position: int, before: list[Tensor], after: list[Tensor]) -> list[Tensor]:
        pairs = enumerate(zip(before, after, strict=True))
        return [x + feature((position, k), y - x) for k, (x, y) in pairs]

    def attend(position: int) -> Callable[[Any], Any]:
        return lambda output: like(output, [feature((position, k), y) for k, y in enumerate(output)])

    def denoise() -> Tensor:
        z = values[case.latents]
        with torch.no_grad():
            for step in range(STEPS):
                clock.step = step + 1
                now = values if clock.step < changed_at else later
                z = z[: len(now["encoder_hidden_states"])]
                z = z - case.predict(model, now, z, step, STEPS) / STEPS
        return z

    attention = {one: attend(i) for i, one in enumerate(children(case, model, "attention"))}
    with blocks_replaced(case, model, rule) if cache == "stack" else replaced(attention):
        expected = denoise()
    assert relative_error(denoise(), expected) > 1e-3, "no effect of forecasts"
    with enabled(model, policy, STEPS) as handle, handle.request(num_videos=1):
        final = denoise()
    if cache == "stack":
        assert handle.trace.computed_steps == [1, 2, 3, 5, 7, 11]
    assert relative_error(final, expected) < case.tolerance

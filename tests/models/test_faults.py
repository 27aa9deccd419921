# SPDX-License-Identifier: Apache-2.0
"""Regression tests for silent faults of other caching libraries."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import adacache
import pytest
import torch
from model_cases import ALLEGRO, CODEBOOK, COGVIDEOX, LATTE, SKYREELS, WAN, Case, relative_error
from test_models import STEPS, enabled
from torch import Tensor, nn
from unknown import Flat, Unknown

pytest.importorskip("diffusers", reason="diffusers is not installed")

REUSING = adacache.Replay([1, 11, 12])


def test_1_guidance_calls_reuse_separate_tensors() -> None:
    """Two named calls per step in changing order, against separate runs of each branch."""
    model, values, null = WAN.model(), WAN.values(seed=1), WAN.values(seed=2)
    z = values["hidden_states"]

    def alone(some: dict[str, Any]) -> list[Tensor]:
        with torch.no_grad(), enabled(model, REUSING) as handle, handle.request():
            return [WAN.predict(model, some, z, step, STEPS) for step in range(STEPS)]

    expected = {"cond": alone(values), "uncond": alone({**null, "hidden_states": z})}
    with torch.no_grad(), enabled(model, REUSING) as handle, handle.request(branches=2):
        for step in range(STEPS):
            for name in ("cond", "uncond") if step % 3 else ("uncond", "cond"):
                some = values if name == "cond" else {**null, "hidden_states": z}
                with model.cache_context(name):
                    assert torch.equal(WAN.predict(model, some, z, step, STEPS), expected[name][step])


def test_2_model_without_blocks_raises() -> None:
    with pytest.raises(ValueError, match=r"model: found no list of blocks in unknown.Flat"):
        adacache.enable(Flat(), REUSING, num_steps=STEPS)
    # A known class with a changed block: a missing child raises at the first step.
    model, values = ALLEGRO.model(), ALLEGRO.values()
    adacache.enable(model, adacache.AdaCache(codebook=CODEBOOK), num_steps=STEPS, rows_per_video=1)
    block = model.transformer_blocks[1]
    block.attn1 = Wrapped(block.attn1)
    assert torch.isfinite(ALLEGRO.denoise(model, values, STEPS)).all(), "a replaced child is found"
    del block._modules["attn1"]
    with pytest.raises(AttributeError, match="attn1"):
        ALLEGRO.denoise(model, values, STEPS)


class Wrapped(nn.Module):
    """Replaces a module, as adapter libraries do."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.attention = attention

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.attention(*args, **kwargs)


def test_2_sites_are_named() -> None:
    handle = adacache.enable(COGVIDEOX.model(), REUSING, num_steps=STEPS)
    assert handle.sites == [f"blocks.{i}.{part}" for i in range(4) for part in ("attention", "block")]


def test_2_blocks_that_do_not_run_are_an_error() -> None:
    class Idle(Unknown):
        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            return x

    with pytest.warns(UserWarning, match="Idle is not a known model"):
        adacache.enable(model := Idle().requires_grad_(False), REUSING, num_steps=STEPS)
    with pytest.raises(RuntimeError, match=r"model: its forward ran no block of \['zeta', 'alpha'\]"):
        model(torch.randn(1, 4, 8), torch.ones(1))


def test_3_latte_blocks_run_in_interleaved_order() -> None:
    """Blocks run in the interleaved order of the plain model: spatial, temporal, spatial ..."""
    model, values = LATTE.model(), LATTE.values()
    plain = LATTE.denoise(model, values, STEPS)
    order: list[str] = []
    for name in LATTE.lists:
        for block in getattr(model, name):
            block.register_forward_hook(lambda *_, name=name: order.append(name))
    with enabled(model, adacache.AdaCache(codebook={9.0: 1})) as handle:
        assert torch.equal(LATTE.denoise(model, values, STEPS), plain)
        assert [site.split(".")[0] for site in handle.sites][::2] == ["spatial_blocks", "temporal_blocks"] * 4
    assert order == [*LATTE.lists] * 4 * STEPS
    # A reused step with the latents of the computed step differs only by rounding.
    z = values["hidden_states"]
    with torch.no_grad(), enabled(model, REUSING) as handle, handle.request():
        computed, reused = (LATTE.predict(model, values, z, 0, STEPS) for _ in range(2))
    assert relative_error(reused, computed) < 1e-5


@pytest.mark.parametrize("case", [LATTE, WAN, COGVIDEOX], ids=lambda case: case.name)
def test_4_second_prompt_is_independent_of_the_first(case: Case) -> None:
    first, second = case.values(seed=1), case.values(seed=2)
    model = case.model()
    with enabled(model, adacache.AdaCache(codebook=CODEBOOK)) as handle:
        alone, schedule = case.denoise(model, second, STEPS), handle.trace.computed
    with enabled(model, adacache.AdaCache(codebook=CODEBOOK)) as handle:
        case.denoise(model, first, STEPS)
        assert torch.equal(case.denoise(model, second, STEPS), alone)
        assert handle.trace.computed == schedule
        assert handle.trace.computed_steps[:2] == [1, 2]


def test_5_block_lists_are_in_model_order() -> None:
    """For any hash seed; the order of a set of these names would depend on it."""
    script = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "import torch, adacache\n"
        "from unknown import Unknown\n"
        "model = Unknown()\n"
        "adacache.enable(model, adacache.Replay([1]), num_steps=12)\n"
        "print(model._adacache_handle.describe()['block_lists'])"
    )
    paths = os.pathsep.join((str(Path(__file__).parent), *sys.path))
    for seed in ("0", "1"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": paths}
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == "['zeta', 'alpha']"


@pytest.mark.parametrize("case", [LATTE, WAN, COGVIDEOX], ids=lambda case: case.name)
def test_6_metric_depends_on_the_video(case: Case) -> None:
    """Other latents or another prompt with the same timesteps give different distances."""
    model, values, other = case.model(), case.values(seed=1), case.values(seed=2)
    curves = []
    for some in (
        values,
        {**values, case.latents: other[case.latents]},
        {**other, case.latents: values[case.latents]},
    ):
        with enabled(model, adacache.AdaCache(codebook={99.0: 1})) as handle:
            case.denoise(model, some, STEPS)
        curves.append([value for _, value in next(iter(handle.trace.series("distance").values()))])
    for other_curve in curves[1:]:
        assert sum(abs(a - b) / a > 1e-3 for a, b in zip(curves[0], other_curve, strict=True)) > STEPS // 2


@pytest.mark.parametrize("case", [ALLEGRO, SKYREELS], ids=lambda case: case.name)
def test_7_unregistered_classes_are_cached(case: Case) -> None:
    model = case.model()
    with enabled(model, adacache.AdaCache(codebook=case.codebook)) as handle:
        case.denoise(model, case.values(), STEPS)
    assert handle.known
    assert 4 < len(handle.trace.computed_steps) < STEPS


def test_7_unknown_class_is_cached() -> None:
    model = Unknown().requires_grad_(False)
    x = torch.randn(1, 4, 8)

    def run(num_steps: int) -> Tensor:
        z = x
        for step in range(num_steps):
            z = z - model(z, torch.full((1,), 1000.0 * (1 - step / num_steps))) / num_steps
        return z

    plain = run(STEPS)
    with pytest.warns(UserWarning, match=r"detected in \['zeta', 'alpha'\], and the residual of the middle"):
        handle = adacache.enable(
            model, adacache.AdaCache(codebook={9.0: 3}), num_steps=STEPS, rows_per_video=1
        )
    reused = run(STEPS)
    assert handle.trace.computed_steps == [1, 2, 5, 8, 11, 12]
    assert 0 < relative_error(reused, plain) < 0.1
    assert handle.trace.measurements[0]["site"] == "blocks.2.block"

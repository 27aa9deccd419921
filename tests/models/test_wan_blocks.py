# SPDX-License-Identifier: Apache-2.0
"""The block program of Wan on every form of its block: norms, images, timesteps per token, dtypes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import adacache
import pytest
import torch
from model_cases import SKYREELS, WAN, WAN_SIZE, Case, ids, randn, relative_error
from test_block_programs import accelerated, as_loaded, in_dtype
from test_models import STEPS, enabled
from torch import Tensor, nn

pytest.importorskip("diffusers", reason="diffusers is not installed")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def _built(name: str, **config: Any) -> Any:
    def build() -> nn.Module:
        import diffusers

        return getattr(diffusers, name)(**{**WAN_SIZE, **config})

    return build


def _per_token(t: float, rows: int, tokens: int) -> Tensor:
    """Earlier tokens are less noisy, the first ones not at all, in each row in another way."""
    grid = torch.linspace(0, 1, tokens)[None] * torch.linspace(0.5, 1, rows)[:, None]
    return t * grid


def _one_column(videos: int, frames: int) -> dict[str, Any]:
    """Two tokens per frame: as many tokens as a block has modulators."""
    return {**WAN.inputs(videos, frames), "hidden_states": randn(videos, 4, frames, 4, 2)}


FORMS = [
    WAN,
    replace(WAN, name="no norm before cross-attention", build=_built(WAN.name, cross_attn_norm=False)),
    replace(
        WAN,
        name="image",
        build=_built(WAN.name, image_dim=8, added_kv_proj_dim=24),
        inputs=lambda videos, frames: {
            **WAN.inputs(videos, frames),
            "encoder_hidden_states_image": randn(videos, 3, 8),
        },
    ),
    replace(WAN, name="timestep per token", timestep=lambda t, rows: _per_token(t, rows, 12)),
    replace(WAN, name="six tokens", inputs=_one_column, timestep=lambda t, rows: _per_token(t, rows, 6)),
    replace(
        SKYREELS,
        name="timestep per frame",
        timestep=lambda t, rows: _per_token(t, rows, 3),
        options={"return_dict": False, "enable_diffusion_forcing": True},
    ),
    replace(
        SKYREELS,
        name="timestep per frame, six tokens",
        inputs=_one_column,
        timestep=lambda t, rows: _per_token(t, rows, 3),
        options={"return_dict": False, "enable_diffusion_forcing": True},
    ),
]
CHECKED = FORMS
"""The cases of the tests, see conftest.py."""
PER_TOKEN = FORMS[3:]


def cast(case: Case, dtype: str, videos: int = 2) -> tuple[Any, dict[str, Any]]:
    model, values = case.model(), case.values(videos)
    if dtype == "as loaded":
        return as_loaded(model, torch.bfloat16), in_dtype(values, torch.bfloat16)
    return model.to(getattr(torch, dtype)), in_dtype(values, getattr(torch, dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "as loaded"])
def test_every_form_in_both_tiers(case: Case, dtype: str) -> None:
    model, values = cast(case, dtype)
    plain = case.denoise(model, values, 3)
    with accelerated(model) as handle:
        assert torch.equal(case.denoise(model, values, 3), plain)
        found = handle.describe()
        assert (found["fused_blocks"], found["not_fused"]) == (len(case.blocks(model)), {})
    with accelerated(model, "close"):
        error = relative_error(case.denoise(model, values, 3).float(), plain.float())
        assert error < (1e-5 if dtype == "float32" else 0.02)


@pytest.mark.parametrize("dtype", ["bfloat16", "as loaded"])
def test_every_sublayer_runs_on_the_ops(case: Case, dtype: str) -> None:
    """Also beside a 16-bit stream: three residuals per block, and in the close tier all norms."""
    model, values = cast(case, dtype)
    blocks = len(case.blocks(model))
    norms = sum(isinstance(block.norm2, nn.LayerNorm) for _, block in case.blocks(model)) + blocks
    for tier, joined in (("exact", 0), ("close", norms)):
        with accelerated(model, tier), torch.profiler.profile() as profile:
            case.denoise(model, values, 1)
        names = [event.name for event in profile.events() if event.name.startswith("adacache::")]
        assert names.count("adacache::gated_residual_norm") == joined
        assert names.count("adacache::gated_residual") == 3 * blocks - joined
        assert names.count("adacache::layer_norm_modulate") == (blocks if tier == "close" else 0)


@pytest.mark.parametrize("variant", PER_TOKEN, ids=ids)
@pytest.mark.parametrize("tier", ["exact", "close"])
def test_timesteps_per_token_with_caching(variant: Case, tier: str) -> None:
    """The measured gate is that of each token; wrapped blocks form it from the model's own outputs."""
    model, values = variant.model(), variant.values(3, seed=1)
    values["hidden_states"] = values["hidden_states"] * torch.tensor([1.0, 4.0, 0.25]).view(3, 1, 1, 1, 1)
    policy = adacache.AdaCache(codebook=variant.codebook)
    finals, traces = [], []
    for fused in (False, tier):
        with enabled(model, policy, fused=fused) as handle:
            finals.append(variant.denoise(model, values, STEPS))
            traces.append(handle.trace)
    assert traces[0].computed == traces[1].computed
    assert any(len(traces[0].steps_of(video)) < STEPS for video in range(3)), "trivial schedule"
    for old, new in zip(*(trace.series("distance").values() for trace in traces), strict=True):
        assert new == [(step, pytest.approx(value, rel=1e-4)) for step, value in old]
    assert relative_error(finals[1], finals[0]) <= (0 if tier == "exact" else 1e-4)


@pytest.mark.parametrize("tier", ["exact", "close"])
@pytest.mark.parametrize("dtype", ["bfloat16", "as loaded"])
def test_a_16_bit_stream_is_cached_in_its_dtype(dtype: str, tier: str) -> None:
    """The stack's residual and the measured one: 2 bytes per value each."""
    model, values = cast(WAN, dtype)
    plain = WAN.denoise(model, values, STEPS)
    with enabled(model, adacache.AdaCache(codebook={9.0: 1}), fused=tier) as handle:
        final = WAN.denoise(model, values, STEPS)
        assert handle.trace.cache_bytes == 2 * 2 * (2 * 12 * 24)
        assert handle.trace.measurements
    assert relative_error(final.float(), plain.float()) <= (0 if tier == "exact" else 0.02)
    with enabled(model, adacache.AdaCache(codebook={9.0: 3}), fused=tier) as handle:
        reused = WAN.denoise(model, values, STEPS)
        assert len(handle.trace.computed_steps) < STEPS
    assert 1e-4 < relative_error(reused.float(), plain.float()) < 0.5


def test_a_planned_stack_runs_on_the_ops() -> None:
    """A planned path of the stack's residual computes its steps on fused blocks."""
    model, values = WAN.model(), WAN.values(2)
    policy = adacache.PlannedPath([1, 2, 5, 8, STEPS], [0.0] + [0.5] * 4, "stack")
    finals = []
    for fused in (False, True):
        with enabled(model, policy, fused=fused) as handle:
            finals.append(WAN.denoise(model, values, STEPS))
            assert handle.describe()["runs"] == ("fused blocks" if fused else "wrapped blocks")
            assert handle.trace.computed_steps == [1, 2, 5, 8, STEPS]
    assert torch.equal(*finals)
    assert relative_error(finals[0], WAN.denoise(model, values, STEPS)) > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "as loaded"])
def test_lora_on_fused_blocks(dtype: str) -> None:
    peft = pytest.importorskip("peft")
    model, values = cast(WAN, dtype)
    without = WAN.denoise(model, values, 2)
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_out.0", "net.2"], init_lora_weights=False)
    with accelerated(model) as handle:
        model.add_adapter(config)
        model.requires_grad_(False)
        fused = WAN.denoise(model, values, 2)
        assert handle.describe()["fused_blocks"] == len(WAN.blocks(model))
    assert torch.equal(fused, WAN.denoise(model, values, 2))
    assert relative_error(fused.float(), without.float()) > 1e-3


def test_float64_runs_the_models_own_blocks() -> None:
    model, values = cast(WAN, "float64")
    plain = WAN.denoise(model, values, 2)
    with accelerated(model, "close"):
        assert torch.equal(WAN.denoise(model, values, 2), plain)


@pytest.mark.parametrize("variant", [WAN, PER_TOKEN[0]], ids=ids)
def test_gradients_of_tables_alone(variant: Case) -> None:
    """The ops have no backward pass: a block whose tables need gradients runs without them."""
    model, values = variant.model(), variant.values()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("scale_shift_table"))

    def gradients() -> list[Tensor]:
        model.zero_grad()
        variant.predict(model, values, values["hidden_states"], 3, STEPS).square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain = gradients()
    with accelerated(model, "close"):
        fused = gradients()
    assert len(plain) == len(variant.blocks(model)) + 1
    for one, other in zip(plain, fused, strict=True):
        torch.testing.assert_close(one, other)

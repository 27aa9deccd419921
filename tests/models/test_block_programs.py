# SPDX-License-Identifier: Apache-2.0
"""Block programs: blocks of known classes on the fused ops, with and without caching."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import adacache
import pytest
import torch
from adacache.fused.modules import fingerprint
from adacache.fused.open_sora import OpenSoraBlock
from model_cases import (
    ALLEGRO,
    CHRONOEDIT,
    COGVIDEOX,
    COGVIDEOX_SIZE,
    CONSISID,
    COSMOS,
    COSMOS_SIZE,
    FRAMEPACK,
    HUNYUAN,
    HUNYUAN_15,
    HUNYUAN_IMAGE,
    KANDINSKY,
    LATTE,
    LTX,
    LTX2,
    LTX2_SIZE,
    MOCHI,
    OPEN_SORA,
    OPEN_SORA_PACKED,
    OPEN_SORA_WINDOWS,
    SANA,
    SANA_SIZE,
    SKYREELS,
    WAN,
    WAN_ANIMATE,
    WAN_VACE,
    Case,
    denoise_slowly,
    ids,
    of_diffusers,
    randn,
    relative_error,
)
from pipeline_cases import PIPELINES
from test_models import BLOCK, STEPS, enabled
from torch import Tensor, nn

pytest.importorskip("diffusers", reason="diffusers is not installed")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

CHECKED = [
    LATTE,
    OPEN_SORA_PACKED,
    COGVIDEOX,
    WAN,
    LTX,
    HUNYUAN,
    MOCHI,
    ALLEGRO,
    LTX2,
    KANDINSKY,
    COSMOS,
    SANA,
]
"""The cases of the tests, see conftest.py."""
PARTS = {
    OPEN_SORA_PACKED.name: ("attn", "to_q"),
    HUNYUAN.name: ("attn", "to_q"),
    KANDINSKY.name: ("self_attention", "to_query"),
}
"""An attention of a block, and a linear layer of it; of the others ("attn1", "to_q")."""
ROUNDED_ONCE = [WAN, MOCHI, KANDINSKY]
"""Models whose own norms are computed in float32 and rounded once."""


LTX_IMAGE = replace(
    LTX,
    name="LTX, timestep per token",
    timestep=lambda t, rows: t * torch.linspace(0, 1, 18).expand(rows, -1),
)


def _one_frame(case: Case) -> Case:
    """The first block gets a transposed view of the embedding."""
    return replace(case, name=f"{case.name}, one frame", inputs=lambda videos, frames: case.inputs(videos, 1))


def _ltx2(name: str, options: Mapping[str, Any] | None = None, **config: Any) -> Case:
    return replace(
        LTX2,
        name=f"LTX-2, {name}",
        build=of_diffusers(LTX2.name, **LTX2_SIZE, **config),
        inputs=lambda videos, frames: {**LTX2.inputs(videos, frames), "sigma": torch.full((videos,), 500.0)},
        options={**LTX2.options, **(options or {})},
    )


def _cosmos(
    name: str, more: Callable[[int, int], dict[str, Any]] = lambda videos, frames: {}, **config: Any
) -> Case:
    return replace(
        COSMOS,
        name=f"Cosmos, {name}",
        build=of_diffusers(COSMOS.name, **{**COSMOS_SIZE, **config}),
        inputs=lambda videos, frames: {**COSMOS.inputs(videos, frames), **more(videos, frames)},
    )


FORMS = [
    *map(_one_frame, (MOCHI, ALLEGRO, SANA)),
    _ltx2("modulated text", cross_attn_mod=True, audio_cross_attn_mod=True, gated_attn=True),
    _ltx2("modulated text of the video", cross_attn_mod=True, use_prompt_adaln_single=False),
    _ltx2("streams apart", {"isolate_modalities": True}),
    _ltx2("perturbed", {"spatio_temporal_guidance_blocks": [1]}, perturbed_attn=True),
    replace(
        LTX2,
        name="LTX-2, timestep per token",
        inputs=lambda videos, frames: {
            **LTX2.inputs(videos, frames),
            "audio_timestep": torch.full((videos, 4), 300.0),
        },
        timestep=LTX_IMAGE.timestep,
    ),
    replace(
        COSMOS,
        name="Cosmos, timestep per frame",
        timestep=lambda t, rows: t * torch.linspace(0, 1, 3).view(1, 1, 3, 1, 1).expand(rows, -1, -1, -1, -1),
    ),
    _cosmos("learned positions", extra_pos_embed_type="learnable"),
    _cosmos(
        "control",
        lambda videos, frames: {"block_controlnet_hidden_states": [randn(videos, frames * 4, 24)] * 4},
        controlnet_block_every_n=1,
    ),
    replace(
        _cosmos(
            "image",
            lambda videos, frames: {"encoder_hidden_states": (randn(videos, 5, 24), randn(videos, 3, 8))},
            img_context_dim_in=8,
            img_context_num_tokens=3,
            img_context_dim_out=24,
        ),
        keeps_float32=True,
    ),
    replace(
        SANA,
        name="Sana-Video, guidance",
        build=of_diffusers(SANA.name, **SANA_SIZE, guidance_embeds=True),
        inputs=lambda videos, frames: {**SANA.inputs(videos, frames), "guidance": torch.full((videos,), 4.0)},
    ),
    replace(
        SANA,
        name="Sana-Video, timestep per token",
        timestep=lambda t, rows: t * torch.linspace(0, 1, 12).expand(rows, -1),
    ),
]
"""Forms of the blocks that other settings and arguments of their models give."""


@pytest.fixture(autouse=True)
def twins_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program of a class that no package index ships runs its twin."""
    twin = fingerprint(type(OPEN_SORA.blocks(OPEN_SORA.model())[0][1]).forward)
    monkeypatch.setattr(OpenSoraBlock, "forwards", OpenSoraBlock.forwards | {twin})


@contextlib.contextmanager
def accelerated(model: Any, fused: bool | str = True) -> Iterator[adacache.Accelerated]:
    handle = adacache.accelerate(model, fused=fused)
    try:
        yield handle
    finally:
        adacache.disable(model)


def cast(case: Case, dtype: torch.dtype, videos: int = 2) -> tuple[Any, dict[str, Any]]:
    """The model and inputs in a dtype."""
    model: Any = case.model()
    model = as_loaded(model, dtype) if case.keeps_float32 else model.to(dtype)
    return model, in_dtype(case.values(videos), dtype)


def as_loaded(model: Any, dtype: torch.dtype) -> Any:
    """A model in a dtype with the modules in float32 that `from_pretrained` keeps so."""
    model.to(dtype)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if set(model._keep_in_fp32_modules or ()) & set(name.split(".")):
            tensor.data = tensor.data.float()
    return model


def in_dtype(values: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in values.items()
    }


def attributes(model: nn.Module) -> dict[str, Any]:
    return {name: (type(module), sorted(module.__dict__)) for name, module in model.named_modules()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_exact_tier_changes_no_bit(case: Case, dtype: torch.dtype) -> None:
    model, values = cast(case, dtype)
    before, plain = attributes(model), case.denoise(model, values, 3)
    with accelerated(model) as handle:
        assert torch.equal(case.denoise(model, values, 3), plain)
        found = handle.describe()
        assert (found["runs"], found["tier"]) == ("fused blocks", "exact")
        assert found["fused_blocks"] == len(case.blocks(model))
        assert not found["not_fused"]
    assert attributes(model) == before
    assert torch.equal(case.denoise(model, values, 3), plain)


@pytest.mark.parametrize(
    "variant",
    [
        OPEN_SORA,
        OPEN_SORA_WINDOWS,
        CONSISID,
        CHRONOEDIT,
        SKYREELS,
        WAN_VACE,
        WAN_ANIMATE,
        FRAMEPACK,
        HUNYUAN_15,
        HUNYUAN_IMAGE,
        LTX_IMAGE,
        *FORMS,
    ],
    ids=ids,
)
def test_variants_of_the_families(variant: Case) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        autocast = variant.keeps_float32 and dtype is not torch.float32
        model, values = cast(variant, torch.float32 if autocast else dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            plain = variant.denoise(model, values, 2)
            with accelerated(model) as handle:
                assert torch.equal(variant.denoise(model, values, 2), plain)
                assert handle.describe()["fused_blocks"] == len(variant.blocks(model))
            with accelerated(model, "close"):
                error = relative_error(variant.denoise(model, values, 2).float(), plain.float())
                assert error < (1e-5 if dtype is torch.float32 else 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.sampled(2)
def test_the_close_tier_is_as_accurate_as_plain(case: Case, dtype: torch.dtype) -> None:
    """Against the same weights in a wider dtype, the error is at most twice that of the plain model."""
    widest = torch.float32 if case.keeps_float32 else torch.float64
    if dtype is widest:
        pytest.skip("the model runs in no wider dtype")
    model, values = cast(case, dtype)
    wide = copy.deepcopy(model).to(widest)
    exact = case.denoise(wide, in_dtype(values, widest), 1)
    plain = case.denoise(model, values, 1)
    with accelerated(model, "close") as handle:
        close = case.denoise(model, values, 1)
        assert handle.describe()["tier"] == "close"
    if case not in ROUNDED_ONCE or dtype is torch.float32:
        assert not torch.equal(close, plain), "the norms are the model's own"
    rounding = torch.finfo(dtype).eps * exact.abs().max()
    assert (close - exact).abs().max() <= 2 * (plain - exact).abs().max() + rounding


@pytest.mark.sampled(2)
def test_blocks_run_on_the_ops(case: Case) -> None:
    """In the close tier, each block forms its residuals and its norms in as many ops."""
    model, values = case.model(), case.values()
    z = values[case.latents]

    def count(fused: bool | str) -> dict[str, int]:
        with accelerated(model, fused), torch.profiler.profile() as profile, torch.no_grad():
            case.predict(model, values, z, 0, STEPS)
        names = [event.name for event in profile.events()]
        found = [name.removesuffix("_out") for name in names if name.startswith("adacache::")]
        return {name: found.count(name) for name in set(found)}

    exact, close = count("exact"), count("close")
    assert set(exact) == {"adacache::gated_residual"}
    residuals = exact["adacache::gated_residual"]
    assert residuals > 2 * len(case.blocks(model)) - 1
    fused = close["adacache::gated_residual_norm"]
    assert fused + close.get("adacache::gated_residual", 0) == residuals
    assert fused >= sum(hasattr(block, "norm2") for _, block in case.blocks(model))


@pytest.mark.parametrize("tier", ["exact", "close"])
@pytest.mark.sampled(2)
def test_caching_gives_what_wrapped_blocks_give(case: Case, tier: str) -> None:
    """Three videos with schedules of their own, so that steps are mixed; and the rule as written out."""
    model, batch = case.model(), case.values(3, seed=1)
    scale = torch.tensor([1.0, 4.0, 0.25]).view(3, *[1] * (batch[case.latents].ndim - 1))
    batch[case.latents] = batch[case.latents] * scale
    policy = adacache.AdaCache(codebook=case.codebook)
    with enabled(model, policy, fused=False) as handle:
        assert handle.describe()["runs"] == "wrapped blocks"
        wrapped, expected = case.denoise(model, batch, STEPS), handle.trace
    assert len({tuple(expected.steps_of(video)) for video in range(3)}) > 1, "no step is mixed"
    with enabled(model, policy, fused=tier) as handle:
        final, trace = case.denoise(model, batch, STEPS), handle.trace
    assert trace.computed == expected.computed
    for (_, seen), (_, wanted) in zip(
        trace.series("distance").items(), expected.series("distance").items(), strict=True
    ):
        assert seen == [(step, pytest.approx(value, rel=case.tolerance)) for step, value in wanted]
    assert torch.equal(final, wrapped) if tier == "exact" else relative_error(final, wrapped) < case.tolerance
    values = case.values()
    rule, computed, _ = denoise_slowly(case, model, values, STEPS, case.codebook, BLOCK)
    with enabled(model, policy, fused=tier) as handle:
        assert relative_error(case.denoise(model, values, STEPS), rule) < case.tolerance
        assert handle.trace.computed_steps == computed


@pytest.mark.parametrize("tier", ["exact", "close"])
@pytest.mark.sampled(2)
def test_guidance_in_two_calls_gives_what_wrapped_blocks_give(case: Case, tier: str) -> None:
    model, values, null = case.model(), case.values(seed=1), case.values(seed=2)
    finals, traces = [], []
    for fused in (False, tier):
        with enabled(model, adacache.AdaCache(codebook=case.codebook), fused=fused) as handle:
            finals.append(case.denoise_in_two_calls(model, values, null, STEPS, False))
            traces.append(handle.trace.computed_steps)
    assert traces[0] == traces[1] != list(range(1, STEPS + 1))
    assert relative_error(finals[1], finals[0]) <= (0 if tier == "exact" else case.tolerance)


@pytest.mark.sampled(2)
def test_kept_outputs_of_sublayers(case: Case) -> None:
    """PAB reuses what the children of blocks return."""
    model, values = case.model(), case.values()
    policy = adacache.PAB(window=(0.45 * case.schedule, 0.93 * case.schedule))
    finals = []
    for fused in (False, True):
        with enabled(model, policy, fused=fused):
            finals.append(case.denoise(model, values, STEPS))
    assert torch.equal(finals[0], finals[1])
    assert not torch.equal(finals[0], case.denoise(model, values, STEPS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.sampled(2)
def test_children_of_blocks_stay_the_models_own(case: Case, dtype: torch.dtype) -> None:
    """Replaced linear layers (as LoRA and quantisation do), patched attention, and hooks on children."""

    class Replaced(nn.Module):
        def __init__(self, base: nn.Module):
            super().__init__()
            self.base = base

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + 0.5 * torch.tanh(self.base(x))

    model, values = cast(case, dtype)
    untouched = case.denoise(model, values, 2)
    child, linear = PARTS.get(case.name, ("attn1", "to_q"))
    for _, block in case.blocks(model):
        attention = block.get_submodule(child)
        setattr(attention, linear, Replaced(getattr(attention, linear)))
        attention.register_forward_hook(lambda module, given, output: doubled(output))
    plain = case.denoise(model, values, 2)
    assert relative_error(plain.float(), untouched.float()) > 1e-2
    with accelerated(model) as handle:
        assert torch.equal(case.denoise(model, values, 2), plain)
        assert not handle.describe()["not_fused"]
    with enabled(model, adacache.AdaCache(codebook={9.0: 1})):
        assert torch.equal(case.denoise(model, values, 2), plain)


def doubled(output: Any) -> Any:
    return tuple(2 * value for value in output) if isinstance(output, tuple) else 2 * output


def doubling(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: doubled(forward(*args, **kwargs))


def hook(block: Any) -> None:
    block.register_forward_hook(lambda module, given, output: doubled(output))


def pre_hook(block: Any) -> None:
    def change(module: Any, args: Any, kwargs: Any) -> Any:
        return tripled(args), dict(zip(kwargs, tripled(tuple(kwargs.values())), strict=True))

    block.register_forward_pre_hook(change, with_kwargs=True)


def tripled(values: Any) -> Any:
    """The first value times 3, if it is one of the streams."""
    return (3 * values[0], *values[1:]) if values and isinstance(values[0], Tensor) else values


def patch(block: Any) -> None:
    block.forward = doubling(block.forward)


def subclass(block: Any) -> None:
    base = type(block)

    class Changed(base):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return doubled(super().forward(*args, **kwargs))

    block.__class__ = Changed


def compiled(block: Any) -> None:
    block.compile(backend="eager")


CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "hook": (hook, "it has hooks"),
    "pre_hook": (pre_hook, "it has hooks"),
    "patch": (patch, "its forward is replaced"),
    "subclass": (subclass, "its class has an unknown forward"),
    "compiled": (compiled, "it is compiled"),
}


@pytest.mark.parametrize("change", list(CHANGES))
@pytest.mark.parametrize("fused", ["exact", "close"])
@pytest.mark.sampled(8)
def test_a_changed_block_runs_as_it_is(case: Case, change: str, fused: str) -> None:
    model, values = case.model(), case.values()
    untouched = case.denoise(model, values, 2)
    with accelerated(model, fused):
        unchanged = case.denoise(model, values, 2)
    name, block = case.blocks(model)[2]
    (apply, reason) = CHANGES[change]
    apply(block)
    plain = case.denoise(model, values, 2)
    assert change == "compiled" or relative_error(plain, untouched) > 1e-3, "the change has no effect"
    with accelerated(model, fused) as handle:
        found = handle.describe()
        assert found["fused_blocks"] == len(case.blocks(model)) - 1
        assert [(key, len(names)) for key, names in found["not_fused"].items()] == [(reason, 1)]
        assert found["not_fused"][reason][0].startswith(name)
        seen = case.denoise(model, values, 2)
        assert relative_error(seen, plain) <= (0 if fused == "exact" else case.tolerance)
    if change != "compiled":
        assert relative_error(plain, unchanged) > 1e-3
    with enabled(model, adacache.AdaCache(codebook={9.0: 1}), fused=fused) as cached:
        seen = case.denoise(model, values, 2)
        assert relative_error(seen, plain) <= (0 if fused == "exact" else case.tolerance)
        assert cached.describe()["not_fused"] == found["not_fused"]


@pytest.mark.parametrize("variant", [COGVIDEOX, HUNYUAN, HUNYUAN_IMAGE, MOCHI, COSMOS], ids=ids)
def test_a_changed_norm_leaves_its_block_to_the_model(variant: Case) -> None:
    """Programs compute adaptive norms from their parts, so a hook on one would not run."""
    model, values = variant.model(), variant.values()
    untouched = variant.denoise(model, values, 2)
    first, last = variant.blocks(model)[0][1], variant.blocks(model)[-1][1]
    changed = [first.norm1, last.norm if hasattr(last, "norm") else last.norm2]
    for norm in changed:
        norm.register_forward_hook(lambda module, given, output: doubled(output))
    plain = variant.denoise(model, values, 2)
    assert relative_error(plain, untouched) > 1e-3
    with accelerated(model) as handle:
        assert torch.equal(variant.denoise(model, values, 2), plain)
        ((reason, blocks),) = handle.describe()["not_fused"].items()
    assert (reason, len(blocks)) == ("its norms are not the known ones", len(changed))


@pytest.mark.sampled(2)
def test_a_class_that_is_patched_later(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model, values = case.model(), case.values()
    kinds = {type(block) for _, block in case.blocks(model)}
    with accelerated(model) as handle:
        untouched = case.denoise(model, values, 2)
        for kind in kinds:
            monkeypatch.setattr(kind, "forward", doubling(kind.forward))
        seen = case.denoise(model, values, 2)
        assert handle.describe()["runs"] == "wrapped blocks"
    assert torch.equal(seen, case.denoise(model, values, 2))
    assert not torch.equal(seen, untouched)


@pytest.mark.sampled(2)
def test_gradients_flow_through_an_accelerated_model(case: Case) -> None:
    model, values = case.model().requires_grad_(True), case.values()

    def gradients() -> list[Tensor | None]:
        model.zero_grad()
        case.predict(model, values, values[case.latents], 0, STEPS).square().sum().backward()
        return [p.grad for p in model.parameters()]

    plain = gradients()
    with accelerated(model):
        seen = gradients()
    assert any(g is not None for g in plain)
    for one, other in zip(plain, seen, strict=True):
        assert (one is None) == (other is None)
        assert one is None or other is None or torch.allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.sampled(2)
def test_autocast_in_both_tiers(case: Case) -> None:
    """Where autocast mixes dtypes, residuals are added as the model does."""
    model, values = case.model(), case.values()
    with torch.autocast("cpu", torch.bfloat16):
        plain = case.denoise(model, values, 2)
        with accelerated(model):
            assert torch.equal(case.denoise(model, values, 2), plain)
        with accelerated(model, "close"):
            assert relative_error(case.denoise(model, values, 2), plain) < 0.1


def test_compiled_blocks_share_graphs() -> None:
    """A graph is shared by all blocks but the measured one, which is not compiled."""
    import diffusers
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    case = COGVIDEOX
    torch.manual_seed(0)
    model = diffusers.CogVideoXTransformer3DModel(**{**COGVIDEOX_SIZE, "num_layers": 12})
    model.eval().requires_grad_(False)
    values = case.values()
    plain = case.denoise(model, values, 3)
    with enabled(model, adacache.AdaCache(codebook={9.0: 1})) as handle:
        for _, block in case.blocks(model):
            block.compile(fullgraph=True, backend="eager")
        assert torch.equal(case.denoise(model, values, 3), plain)
        assert handle.trace.measurements
    assert counters["stats"]["unique_graphs"] == 2, "the first block gets slices, which have other strides"
    torch._dynamo.reset()


def test_a_whole_accelerated_model_compiles() -> None:
    """torch.compile traces the plain blocks."""
    model, values = LATTE.model(), LATTE.values()
    plain = LATTE.denoise(model, values, 2)
    torch._dynamo.reset()
    with accelerated(model):
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert relative_error(LATTE.denoise(compiled, values, 2), plain) < 1e-5
        assert torch.equal(LATTE.denoise(model, values, 2), plain)
    torch._dynamo.reset()


def test_a_pipeline_is_accelerated() -> None:
    case = next(case for case in PIPELINES if case.name == "LattePipeline")
    pipeline = case.build()
    plain = case.generate(pipeline)
    handles = adacache.accelerate(pipeline)
    assert {name: handle.describe()["runs"] for name, handle in handles.items()} == {
        "transformer": "fused blocks"
    }
    assert torch.equal(case.generate(pipeline), plain)
    adacache.disable(pipeline)
    assert not any("adacache" in name for m in pipeline.transformer.modules() for name in m.__dict__)
    assert torch.equal(case.generate(pipeline), plain)
    with pytest.raises(ValueError, match="not enabled"):
        adacache.disable(pipeline)


def test_what_fused_accepts() -> None:
    model, policy = LATTE.model(), adacache.AdaCache(codebook={9.0: 1})
    with pytest.raises(ValueError, match="fused: expected True, False or one of"):
        adacache.enable(model, policy, num_steps=9, fused="fast")
    with pytest.raises(ValueError, match="fused: expected True, False or one of"):
        adacache.enable(model, policy, num_steps=9, fused=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='fused: expected True, "exact" or "close", got False'):
        adacache.accelerate(model, fused=False)
    with accelerated(model), pytest.raises(ValueError, match="enabled on it already"):
        adacache.enable(model, policy, num_steps=9)
    with enabled(model, policy), pytest.raises(ValueError, match="enabled on it already"):
        adacache.accelerate(model)
    with pytest.raises(ValueError, match="not enabled"):
        adacache.disable(model)
    with pytest.raises(ValueError, match="has no fused program"):
        adacache.accelerate(nn.Linear(2, 2))


def test_a_fingerprint_ignores_comments_and_annotations() -> None:
    def annotated(x: Tensor, scale: float = 1.0) -> Tensor:
        """Text."""
        return x * scale  # a comment

    def plain(x, scale=1.0):  # type: ignore[no-untyped-def]
        return x * scale

    def other(x: Tensor, scale: float = 2.0) -> Tensor:
        return x * scale

    assert fingerprint(annotated) == fingerprint(plain) != fingerprint(other)
    assert fingerprint(len) == ""

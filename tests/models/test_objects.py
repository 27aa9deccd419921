# SPDX-License-Identifier: Apache-2.0
"""Objects of enabled models: copies, pickles, class identity, `disable` after changes, compiled blocks."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import adacache
import pytest
import torch
from model_cases import CASES, COGVIDEOX, LATTE, WAN, Case, ids
from pipeline_cases import PIPELINES
from torch import nn
from unknown import Block, Unknown

pytest.importorskip("diffusers", reason="diffusers is not installed")

STEPS = 12
P3 = adacache.AdaCache(codebook={99.0: 3})
PIPELINE = {str(case): case for case in PIPELINES}


def is_plain(model: nn.Module) -> bool:
    return not any(
        "adacache" in name or "_adacache_base" in type(module).__dict__
        for module in model.modules()
        for name in ("", *module.__dict__)
    )


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("case", [WAN, LATTE, COGVIDEOX], ids=ids)
def test_copies_are_plain_and_work(case: Case, duplicate: Any) -> None:
    model, values = case.model(), case.values()
    plain = case.denoise(model, values, STEPS)
    handle = adacache.enable(model, P3, num_steps=STEPS, rows_per_video=1)
    cached = case.denoise(model, values, STEPS)
    other = duplicate(model)
    assert is_plain(other)
    assert type(other).__name__ == case.name
    assert torch.equal(case.denoise(other, values, STEPS), plain)
    adacache.enable(other, P3, num_steps=STEPS, rows_per_video=1)
    assert torch.equal(case.denoise(other, values, STEPS), cached)
    adacache.disable(other)
    assert torch.equal(case.denoise(model, values, STEPS), cached), "the original must stay enabled"
    assert handle.trace.computed_steps == [1, 2, 5, 8, 11, 12]
    adacache.disable(model)
    assert is_plain(model)


def test_a_shallow_copy_is_plain() -> None:
    model = WAN.model()
    adacache.enable(model, P3, num_steps=STEPS)
    other = copy.copy(model)
    with pytest.raises(ValueError, match="not enabled"):
        adacache.disable(other)
    adacache.disable(model)
    assert is_plain(model)


def test_a_pipeline_is_copied_plain() -> None:
    case = PIPELINE["WanPipeline"]
    pipeline = case.build()
    plain = case.generate(pipeline)
    adacache.enable(pipeline, P3)
    other = copy.deepcopy(pipeline)
    assert torch.equal(case.generate(other), plain)
    handle = adacache.enable(other, P3)
    case.generate(other)
    assert handle.trace.computed_steps == [1, 2, 5, 8, 11, 12]


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_classes_compare_equal_to_the_plain_ones(case: Case) -> None:
    model = case.model()
    before = [type(module) for module in model.modules()]
    registry = dict.fromkeys(before, "registered")
    adacache.enable(model, P3, num_steps=STEPS)
    for kind, module in zip(before, model.modules(), strict=True):
        assert type(module) == kind  # noqa: E721
        assert type(module) in registry
        assert registry[type(module)] == "registered"
        assert isinstance(module, kind)
        assert type(module) in (kind,)
        assert repr(type(module)) == repr(kind)


def test_from_pipe() -> None:
    """diffusers compares component classes with the annotations of the new pipeline."""
    import diffusers

    case = PIPELINE["WanPipeline"]
    pipeline = case.build()
    adacache.enable(pipeline, P3)
    other = diffusers.WanVideoToVideoPipeline.from_pipe(pipeline)
    assert other.transformer is pipeline.transformer


def test_first_block_cache_of_diffusers_after_adacache() -> None:
    """Its registry is keyed by the class of the blocks."""
    hooks = pytest.importorskip("diffusers.hooks")
    model, values = WAN.model(), WAN.values()
    plain = WAN.denoise(model, values, 9)
    adacache.enable(model, adacache.AdaCache(codebook={9.0: 1}), num_steps=9)
    hooks.apply_first_block_cache(model, hooks.FirstBlockCacheConfig(threshold=1e-9))
    with model.cache_context("cond"):
        assert torch.equal(WAN.denoise(model, values, 9), plain)


@pytest.mark.filterwarnings("ignore:AdaCache. the class of")
@pytest.mark.parametrize("known", [True, False], ids=["made_from_the_plain_class", "made_from_ours"])
def test_a_class_assigned_after_enable_is_wrapped(known: bool) -> None:
    """As `fully_shard` assigns one, from a dict whose keys are classes."""
    classes: dict[type, type] = {}

    def shard(module: Any) -> None:
        kind = type(module)
        if kind not in classes:
            classes[kind] = type(f"Sharded{kind.__name__}", (Mixin, kind), {})
        module.__class__ = classes[kind]

    def shard_all(model: Any) -> None:
        for block in (*model.blocks, model):
            shard(block)

    if known:
        shard_all(WAN.model())
    model, values = WAN.model(), WAN.values()
    plain = WAN.denoise(model, values, STEPS)
    for _ in range(2):
        handle = adacache.enable(model, adacache.Interval(3), num_steps=STEPS, rows_per_video=1)
        if not isinstance(model, Mixin):
            shard_all(model)
        assert isinstance(model, Mixin)
        assert isinstance(model.blocks[1], Mixin)
        assert not torch.equal(WAN.denoise(model, values, STEPS), plain)
        assert handle.trace.computed_steps == [1, 4, 7, 10]
        adacache.disable(model)
        assert torch.equal(WAN.denoise(model, values, STEPS), plain)
        assert isinstance(model, Mixin)


class Mixin:
    """A base that another library adds."""


def test_disable_in_any_order_restores_the_pipeline() -> None:
    case = PIPELINE["WanPipeline_two_transformers"]
    pipeline = case.build()
    plain = case.generate(pipeline)
    first, second = pipeline.transformer, pipeline.transformer_2
    adacache.enable(pipeline, P3)
    adacache.disable(first)  # the model, then the pipeline
    adacache.disable(pipeline)
    assert is_plain(first)
    assert is_plain(second)
    assert torch.equal(case.generate(pipeline), plain)
    adacache.enable(pipeline, P3)
    adacache.disable(pipeline)
    assert torch.equal(case.generate(pipeline), plain)


def test_disable_after_blocks_and_children_were_replaced() -> None:
    model, values = WAN.model(), WAN.values()
    adacache.enable(model, adacache.AdaCache(codebook=WAN.codebook), num_steps=STEPS, rows_per_video=1)
    WAN.denoise(model, values, STEPS)
    measured, attention = model.blocks[1], model.blocks[1].attn1
    other = WAN.model().blocks[2]
    taken = model.blocks[2]
    model.blocks[2] = other
    measured.attn1 = copy.deepcopy(attention)
    adacache.disable(model)
    assert is_plain(model)
    assert is_plain(taken)
    assert is_plain(attention)
    adacache.enable(model, P3, num_steps=STEPS, rows_per_video=1)
    assert torch.isfinite(WAN.denoise(model, values, STEPS)).all()
    adacache.disable(model)
    with pytest.raises(ValueError, match="not enabled"):
        adacache.disable(model)


def test_replaced_transformer_warns() -> None:
    case = PIPELINE["WanPipeline"]
    pipeline, other = case.build(), case.build()
    handle = adacache.enable(pipeline, P3)
    pipeline.transformer = other.transformer
    plain = case.generate(other)
    with pytest.warns(UserWarning, match="transformer was exchanged after AdaCache was enabled"):
        assert torch.equal(case.generate(pipeline), plain)
    adacache.disable(pipeline)
    assert is_plain(handle.handles["transformer"].model)


def test_a_second_pipeline_on_the_same_transformer_runs() -> None:
    case = PIPELINE["WanPipeline"]
    pipeline, other = case.build(), case.build()
    other.transformer = pipeline.transformer
    plain = case.generate(pipeline)
    adacache.enable(pipeline, P3)
    with pytest.warns(UserWarning, match="this call came from elsewhere, so it runs without caching"):
        assert torch.equal(case.generate(other), plain)


@pytest.mark.parametrize("wrap", ["block", "measured", "all"])
def test_enable_after_blocks_were_compiled(wrap: str) -> None:
    torch._dynamo.reset()
    model, values = WAN.model(), WAN.values()
    policy = adacache.AdaCache(codebook=WAN.codebook)
    handle = adacache.enable(model, policy, num_steps=STEPS, rows_per_video=1)
    expected, steps = WAN.denoise(model, values, STEPS), handle.trace.computed_steps
    adacache.disable(model)
    for i in {"block": [0], "measured": [1], "all": [0, 1, 2, 3]}[wrap]:
        model.blocks[i] = torch.compile(model.blocks[i], backend="eager")
    plain = WAN.denoise(model, values, STEPS)
    handle = adacache.enable(model, policy, num_steps=STEPS, rows_per_video=1)
    for _ in range(2):
        final = WAN.denoise(model, values, STEPS)
        assert float((final - expected).abs().mean() / expected.abs().mean()) < 1e-4
        assert handle.trace.computed_steps == steps
    adacache.disable(model)
    assert torch.equal(WAN.denoise(model, values, STEPS), plain)


def test_repeated_enable_and_disable_leaves_no_state() -> None:
    model, values = WAN.model(), WAN.values()
    kinds, handles = [type(module) for module in model.modules()], []
    for _ in range(200):
        handle = adacache.enable(model, P3, num_steps=STEPS, rows_per_video=1)
        handles.append(weakref.ref(handle))
        adacache.disable(model)
    handle = adacache.enable(model, P3, num_steps=STEPS, rows_per_video=1)
    WAN.denoise(model, values, STEPS)
    handles.append(weakref.ref(handle))
    adacache.disable(model)
    del handle
    gc.collect()
    assert not any(one() for one in handles)
    assert [type(module) for module in model.modules()] == kinds


class TwoStreams(Block):
    """Returns the text stream first, and a further value."""

    def forward(self, x: torch.Tensor, text: torch.Tensor, time: torch.Tensor) -> Any:  # type: ignore[override]
        return text + 0.1, super().forward(x, time), {"note": 1}


class Extra(Block):
    def forward(self, x: torch.Tensor, text: torch.Tensor, time: torch.Tensor) -> Any:  # type: ignore[override]
        return super().forward(x, time), text, x.mean(dim=1)


class Model(Unknown):
    def __init__(self, block: type[nn.Module]):
        super().__init__()
        self.zeta = nn.ModuleList(block() for _ in range(4))
        del self.alpha
        self.caption_projection = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))

    def forward(self, x: Any, timestep: torch.Tensor) -> torch.Tensor:
        x = torch.stack(list(x)) if isinstance(x, list) else x
        time, text = (timestep.view(-1, 1, 1) / 1000).to(x.dtype), torch.ones(x.shape[0], 3, 8)
        for block in self.zeta:
            out = block(x, text, time)
            text, x = out[:2] if isinstance(block, TwoStreams) else (out[1], out[0])
        return x * 0.1 + text.mean(dim=1, keepdim=True)


def denoise(model: nn.Module, as_list: bool = False) -> torch.Tensor:
    z = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for step in range(STEPS):
            given = list(z) if as_list else z
            z = z - model(given, torch.full((2,), 1000.0 * (1 - step / STEPS))) / STEPS
    return z


@pytest.mark.filterwarnings("ignore:AdaCache. Model is not a known model")
@pytest.mark.parametrize("as_list", [False, True])
def test_streams_of_an_unknown_model_are_recognized_by_shape(as_list: bool) -> None:
    torch.manual_seed(0)
    model = Model(TwoStreams).requires_grad_(False)
    plain = denoise(model, as_list)
    handle = adacache.enable(model, P3, num_steps=STEPS)
    assert handle.describe()["block_lists"] == ["zeta"], "caption projections are not blocks"
    final = denoise(model, as_list)
    assert handle.trace.computed_steps == [1, 2, 5, 8, 11, 12]
    assert 0 < float((final - plain).abs().mean() / plain.abs().mean()) < 0.2
    adacache.disable(model)
    adacache.enable(model, adacache.AdaCache(codebook={9.0: 1}), num_steps=STEPS)
    assert torch.equal(denoise(model, as_list), plain)


@pytest.mark.filterwarnings("ignore:AdaCache. Model is not a known model")
def test_block_with_an_unknown_output_is_always_computed() -> None:
    torch.manual_seed(0)
    model = Model(Extra).requires_grad_(False)
    plain = denoise(model)
    handle = adacache.enable(model, P3, num_steps=STEPS)
    with pytest.warns(UserWarning, match="Extra returns a tensor that is none of its arguments"):
        assert torch.equal(denoise(model), plain)
    assert handle.trace.computed_steps == list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (None, "expected a torch.nn.Module or a pipeline, got NoneType"),
        ({}, "expected a torch.nn.Module or a pipeline, got dict"),
        (3.5, "expected a torch.nn.Module or a pipeline, got float"),
    ],
)
def test_invalid_models(thing: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adacache.enable(thing, P3, num_steps=STEPS)
    with pytest.raises(ValueError, match="not enabled"):
        adacache.disable(thing)


def test_unsupported_pipelines() -> None:
    class UNetPipeline:
        components = {"unet": nn.Linear(2, 2), "vae": None}  # noqa: RUF012

    class Wrapper:
        def __init__(self) -> None:
            self.model = WAN.model()

    with pytest.raises(ValueError, match=r"found no transformer in UNetPipeline under .*it has \['unet'\]"):
        adacache.enable(UNetPipeline(), P3)
    with pytest.raises(ValueError, match=r"Wrapper has a transformer but no scheduler and no __call__"):
        adacache.enable(Wrapper(), P3)


@pytest.mark.parametrize("policy", [None, {}, 3.0, {0.1: 3}, object()])
def test_invalid_policies(policy: Any) -> None:
    model = WAN.model()
    with pytest.raises(ValueError, match="policy: expected settings such as"):
        adacache.enable(model, policy, num_steps=STEPS)
    assert is_plain(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": None}, "num_steps: expected the number of denoising steps"),
        ({"num_steps": 0}, "num_steps: expected a whole number of at least 1, got 0"),
        ({"num_steps": 12.0}, "num_steps: expected a whole number of at least 1, got 12.0"),
        ({"num_steps": True}, "num_steps: expected a whole number"),
        ({"num_steps": STEPS, "rows_per_video": 0}, "rows_per_video: expected a whole number of at least 1"),
        ({"num_steps": STEPS, "rows_per_video": 1.5}, "rows_per_video: expected a whole number"),
    ],
)
def test_bad_options_of_enable(options: dict[str, Any], message: str) -> None:
    model = WAN.model()
    with pytest.raises(ValueError, match=message):
        adacache.enable(model, P3, **options)
    assert is_plain(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"branches": 1.5}, "branches: expected a whole number of at least 1, got 1.5"),
        ({"branches": 0}, "branches: expected a whole number of at least 1, got 0"),
        ({"num_videos": "1"}, "num_videos: expected a whole number of at least 1, got '1'"),
        ({"num_videos": True}, "num_videos: expected a whole number"),
        ({"video_of_row": [0.7]}, r"video_of_row\[0\]: expected a whole number in 0..0, got 0.7"),
        ({"video_of_row": [True]}, r"video_of_row\[0\]: expected a whole number in 0..0, got True"),
    ],
)
def test_bad_options_of_a_request(options: dict[str, Any], message: str) -> None:
    handle = adacache.enable(WAN.model(), P3, num_steps=STEPS)
    with pytest.raises(ValueError, match=message), handle.request(**options):
        pass


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"codebook": None}, "codebook: expected"),
        ({"codebook": [0.1, 2]}, "codebook: expected"),
        ({"codebook": {0.1: 2}, "metric_blocks": (0.5,)}, "metric_blocks: expected a whole number, got 0.5"),
        ({"codebook": {0.1: 2}, "metric_blocks": 1}, "metric_blocks: expected"),
        ({"codebook": {0.1: 2}, "metric_part": 3}, "metric_part: expected"),
        ({"codebook": {0.1: 2}, "motion": {}}, "motion: expected"),
        ({"codebook": {0.1: 2}, "per_video": None}, "per_video: expected"),
        ({"codebook": {0.1: 2}, "cache_dtype": "float8"}, "cache_dtype: expected"),
        ({"codebook": {0.1: 2}, "rule": None}, "rule: expected"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    model = WAN.model()
    with pytest.raises(ValueError, match=message):
        adacache.enable(model, adacache.AdaCache(**settings), num_steps=STEPS)
    assert is_plain(model)


class TokensFirst(Model):
    """Runs its blocks on tokens [N, B, C]."""

    def __init__(self) -> None:
        super().__init__(Block)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        time = (timestep.view(1, -1, 1) / 1000).to(x.dtype)
        tokens = x.transpose(0, 1)
        for block in self.zeta:
            tokens = block(tokens, time)
        return tokens.transpose(0, 1) * 0.1


@pytest.mark.filterwarnings("ignore:AdaCache. TokensFirst is not a known model")
@pytest.mark.parametrize("tokens", [5, 6])
def test_unknown_row_layout_gives_one_decision(tokens: int) -> None:
    """Layout [N, B, C]: tokens must not be treated as videos, even if N is a multiple of the video count."""
    torch.manual_seed(0)
    model = TokensFirst().requires_grad_(False)
    z = torch.randn(2, tokens, 8, generator=torch.Generator().manual_seed(0))
    z[1] *= 5

    def run() -> torch.Tensor:
        x = z
        with torch.no_grad():
            for step in range(STEPS):
                x = x - model(x, torch.full((2,), 1000.0 * (1 - step / STEPS))) / STEPS
        return x

    plain = run()
    for codebook in ({9.0: 1}, {0.02: 4, 0.05: 3, 0.1: 2, 1.0: 1}):
        handle = adacache.enable(
            model, adacache.AdaCache(codebook=codebook), num_steps=STEPS, rows_per_video=1
        )
        final = run()
        assert handle.trace.num_videos == 2
        assert handle.trace.steps_of(0) == handle.trace.steps_of(1)
        assert all(len(set(record["distance"])) == 1 for record in handle.trace.measurements)
        assert torch.isfinite(final).all()
        if len(codebook) == 1:
            assert torch.equal(final, plain)
        adacache.disable(model)


@pytest.mark.filterwarnings("ignore:AdaCache. Unknown is not a known model")
def test_token_count_change_forces_compute() -> None:
    """For example a model that caches keys and values of a prefix after its first step."""
    torch.manual_seed(0)
    model = Unknown().requires_grad_(False)
    handle = adacache.enable(model, P3, num_steps=STEPS)
    with torch.no_grad(), handle.request():
        for step in range(STEPS):
            x = torch.randn(1, 9 if step == 0 else 4, 8)
            assert model(x, torch.ones(1)).shape == x.shape
    assert handle.trace.computed_steps[:3] == [1, 2, 3]
    assert len(handle.trace.computed_steps) < STEPS

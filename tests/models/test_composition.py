# SPDX-License-Identifier: Apache-2.0
"""AdaCache with offloading, LoRA, torch.compile, and hooks of other libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import adacache
import pytest
import torch
from model_cases import CODEBOOK, COGVIDEOX, LATTE, WAN, Case, relative_error
from pipeline_cases import PIPELINES
from test_models import STEPS, enabled

pytest.importorskip("diffusers", reason="diffusers is not installed")

POLICY = adacache.AdaCache(codebook=CODEBOOK)
WAN_PIPELINE = next(case for case in PIPELINES if case.name == "WanPipeline")


@pytest.mark.parametrize("first", ["offload", "adacache"])
def test_model_offload(first: str) -> None:
    """Offloading removes and adds its hooks at the end of each call. AdaCache stays enabled, in either
    order."""
    accelerate = pytest.importorskip("accelerate")
    assert accelerate
    pipeline = WAN_PIPELINE.build()
    handle = adacache.enable(pipeline, POLICY)
    expected = WAN_PIPELINE.generate(pipeline)
    steps = handle.trace.computed_steps
    if first == "offload":
        adacache.disable(pipeline)
        pipeline.enable_model_cpu_offload(device="cpu")
        handle = adacache.enable(pipeline, POLICY)
    else:
        pipeline.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert torch.equal(WAN_PIPELINE.generate(pipeline), expected)
        assert handle.trace.computed_steps == steps
    assert hasattr(pipeline.transformer, "_hf_hook")
    adacache.disable(pipeline)
    plain = WAN_PIPELINE.generate(pipeline)
    pipeline.remove_all_hooks()
    assert torch.equal(WAN_PIPELINE.generate(pipeline), plain)
    assert not torch.equal(plain, expected)


@pytest.mark.parametrize("case", [LATTE, WAN, COGVIDEOX], ids=lambda case: case.name)
@pytest.mark.parametrize("first", ["offload", "adacache"])
def test_sequential_offload(case: Case, first: str) -> None:
    """Weights are loaded per module call; reused blocks do not load theirs."""
    accelerate = pytest.importorskip("accelerate")
    model, values = case.model(), case.values()
    with enabled(model, POLICY):
        expected = case.denoise(model, values, STEPS)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    if first == "offload":
        accelerate.cpu_offload(model, "cpu", offload_buffers=True)
    with enabled(model, POLICY) as handle:
        if first == "adacache":
            accelerate.cpu_offload(model, "cpu", offload_buffers=True)
        assert torch.equal(case.denoise(model, values, STEPS), expected)
        assert len(handle.trace.computed_steps) < STEPS
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert weights.keys() == model.state_dict().keys()


@pytest.mark.parametrize("first", ["lora", "adacache"])
def test_lora(first: str) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_out.0"], init_lora_weights=False)
    model, values = WAN.model(), WAN.values()

    def add() -> None:
        torch.manual_seed(5)
        model.add_adapter(config)
        model.requires_grad_(False)

    with enabled(model, POLICY):
        without = WAN.denoise(model, values, STEPS)
    if first == "lora":
        add()
    with enabled(model, POLICY) as handle:
        if first == "adacache":
            assert torch.equal(WAN.denoise(model, values, STEPS), without)
            add()
        final = WAN.denoise(model, values, STEPS)
        steps = handle.trace.computed_steps
        assert relative_error(final, without) > 1e-3
        model.delete_adapters("default")
        assert torch.equal(WAN.denoise(model, values, STEPS), without)
    add()
    with enabled(model, POLICY) as handle:
        assert torch.equal(WAN.denoise(model, values, STEPS), final)
        assert handle.trace.computed_steps == steps
    model.delete_adapters("default")


def _compile_blocks(model: Any) -> Any:
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    return model


def _compile_in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def _compile_wrapped(model: Any) -> Any:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize(
    "compile_model",
    [_compile_blocks, pytest.param(_compile_in_place, marks=pytest.mark.slow), _compile_wrapped],
)
@pytest.mark.parametrize("first", ["compile", "adacache"])
@pytest.mark.sampled(2)
def test_compile(first: str, compile_model: Callable[[Any], Any]) -> None:
    """Compiled blocks and compiled transformers, before and after AdaCache is enabled."""
    torch._dynamo.reset()
    case, model = WAN, WAN.model()
    values = case.values()
    with enabled(model, POLICY) as handle:
        expected, steps = case.denoise(model, values, STEPS), handle.trace.computed_steps
    plain = case.denoise(model, values, STEPS)
    compiled = model
    if first == "compile":
        compiled = compile_model(model)
        assert relative_error(case.denoise(compiled, values, STEPS), plain) < 1e-4
    with enabled(compiled, POLICY) as handle:
        if first == "adacache":
            compiled = compile_model(model)
        for _ in range(2):
            assert relative_error(case.denoise(compiled, values, STEPS), expected) < 1e-4
            assert handle.trace.computed_steps == steps
    assert relative_error(case.denoise(compiled, values, STEPS), plain) < 1e-4


def test_compiled_blocks_run_compiled() -> None:
    """All except the measured block, whose child outputs are hooked."""
    torch._dynamo.reset()
    model, values = WAN.model(), WAN.values()
    graphs = []

    def backend(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    for block in model.blocks:
        block.compile(backend=backend, fullgraph=True)
    with enabled(model, POLICY):
        WAN.denoise(model, values, STEPS)
    assert graphs


def test_foreign_hooks_run_on_computed_steps() -> None:
    model, values = WAN.model(), WAN.values()
    calls = []
    with enabled(model, adacache.AdaCache(codebook={99.0: 3})) as handle:
        hook = model.blocks[3].register_forward_hook(lambda *_: calls.append(1))
        WAN.denoise(model, values, STEPS)
        assert len(calls) == len(handle.trace.computed_steps) < STEPS
    hook.remove()


def test_interleaved_requests() -> None:
    """Two interleaved loops on one model, each in its own context."""
    import contextvars

    case, model = LATTE, LATTE.model()
    both = [case.values(seed=4), case.values(seed=5)]
    with enabled(model, POLICY) as handle:
        alone = [case.denoise(model, values, STEPS) for values in both]

        def loop(values: Any) -> Any:
            with handle.request():
                z = values["hidden_states"]
                for step in range(STEPS):
                    z = z - case.predict(model, values, z, step, STEPS) / STEPS
                    yield z

        contexts = [contextvars.copy_context() for _ in both]
        loops = [loop(values) for values in both]
        with torch.no_grad():
            for _ in range(STEPS):
                finals = [context.run(next, turn) for context, turn in zip(contexts, loops, strict=True)]
        assert all(torch.equal(a, b) for a, b in zip(finals, alone, strict=True))
        for context, turn in zip(contexts, loops, strict=True):
            context.run(turn.close)


def test_disable_after_the_class_was_changed() -> None:
    """As by `fully_shard`: `disable` keeps the new class, and `enable` works again."""
    model, values = WAN.model(), WAN.values()
    plain = WAN.denoise(model, values, STEPS)
    adacache.enable(model, POLICY, num_steps=STEPS)
    model.__class__ = type("Other", (type(model),), {})
    with pytest.warns(UserWarning, match=r"the class of \['Other'\] was changed after AdaCache was enabled"):
        adacache.disable(model)
    assert torch.equal(WAN.denoise(model, values, STEPS), plain)
    with enabled(model, POLICY) as handle:
        assert not torch.equal(WAN.denoise(model, values, STEPS), plain)
        assert len(handle.trace.computed_steps) < STEPS
    assert torch.equal(WAN.denoise(model, values, STEPS), plain)


def test_gradients_raise() -> None:
    model, values = WAN.model().requires_grad_(True), WAN.values()
    adacache.enable(model, POLICY, num_steps=STEPS)
    with pytest.raises(RuntimeError, match=r"inference only: call the model under torch\.no_grad"):
        WAN.predict(model, values, values["hidden_states"], 0, STEPS)

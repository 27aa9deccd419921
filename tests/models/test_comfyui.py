# SPDX-License-Identifier: Apache-2.0
"""The node for ComfyUI, against a twin of the interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import adacache
import pytest
import torch
from adacache.plugins.comfyui import NODE_CLASS_MAPPINGS, AdaCacheNode
from torch import Tensor, nn
from twins import comfyui as twin

pytestmark = pytest.mark.filterwarnings("ignore:AdaCache. WanModel is not a known model")

STEPS = 9
POLICY = adacache.AdaCache({0.02: 4, 0.1: 3, 0.4: 2, 9.0: 1})
EVERY = adacache.Interval(1)


def patcher() -> twin.ModelPatcher:
    torch.manual_seed(0)
    return twin.ModelPatcher(twin.BaseModel(twin.WanModel()).requires_grad_(False))


def sample(
    model: Any,
    together: bool | Callable[[int], bool] = True,
    sampler: Any = twin.euler,
    steps: int = STEPS,
    videos: int = 2,
) -> Tensor:
    source = torch.Generator().manual_seed(1)
    noise = torch.randn(videos, 4, 2, 4, 4, generator=source)
    conds = [torch.randn(1, 5, 12, generator=source) for _ in range(2)]
    batched = together if callable(together) else lambda evaluation: together
    return twin.Guider(model, conds, batched).sample(noise, torch.linspace(1, 0, steps + 1), sampler)


def with_node(model: Any, policy: Any, **settings: Any) -> Any:
    return AdaCacheNode().patch(model, policy, **settings)[0]


def trace(model: Any) -> adacache.Trace:
    found: adacache.Trace = model.attachments["adacache"].trace
    return found


@pytest.mark.parametrize("together", [True, False], ids=["one_call", "two_calls"])
def test_results_are_those_of_a_loop(together: bool) -> None:
    """The trace and the output of `handle.request` around the same loop."""
    model = patcher()
    plain = sample(model, together)
    patched = with_node(model, POLICY)
    found = sample(patched, together)
    assert torch.equal(sample(model, together), plain)  # the given patcher is unchanged
    handle = adacache.enable(model.model.diffusion_model, POLICY, num_steps=STEPS)
    with handle.request(num_videos=2, branches=1 if together else 2) as request:
        expected = sample(model, together)
    adacache.disable(model.model.diffusion_model)
    assert torch.equal(found, expected)
    assert not torch.equal(found, plain)
    assert trace(patched).computed_steps == request.trace.computed_steps
    assert 2 < len(request.trace.computed_steps) < STEPS
    assert trace(patched).num_videos == 2


def test_runs_begin_anew() -> None:
    """Also after one that failed, and with another number of steps; between runs the network is plain."""
    model = patcher()
    plain, patched = sample(model), with_node(model, POLICY)
    first = sample(patched)

    def interrupted(predict: Any, x: Tensor, sigmas: Tensor) -> Tensor:
        predict(x, sigmas[0])
        raise InterruptedError("stopped")

    with pytest.raises(InterruptedError):
        sample(patched, sampler=interrupted)
    assert trace(patched).computed_steps == [1]
    assert torch.equal(sample(model), plain)
    sample(patched, steps=12)
    assert trace(patched).num_steps == 12
    assert torch.equal(sample(patched), first)
    assert torch.equal(sample(patched.clone()), first)
    assert torch.equal(sample(patched, steps=0), sample(model, steps=0))
    # A node after a node replaces it.
    assert torch.equal(sample(with_node(patched, EVERY)), plain)


def test_batching_changes_within_a_run() -> None:
    """ComfyUI splits the conditionings when memory is short: nothing kept for the other split is used."""
    model = patcher()
    patched = with_node(model, EVERY)

    def changing(evaluation: int) -> bool:
        return evaluation % 3 != 1

    assert torch.equal(sample(patched, changing), sample(model, changing))
    cached = with_node(model, adacache.Interval(4))
    difference = (sample(cached, changing) - sample(cached)).abs().max()
    assert difference < (sample(model) - sample(cached)).abs().max()


def test_samplers_with_two_calls_per_step() -> None:
    model = patcher()
    with pytest.raises(RuntimeError, match=f"calls the model more than {STEPS} times; set calls_per_step"):
        sample(with_node(model, POLICY), sampler=twin.heun)
    patched = with_node(model, POLICY, calls_per_step=2)
    found = sample(patched, sampler=twin.heun)
    assert found.isfinite().all()
    assert len(trace(patched).computed_steps) < 2 * STEPS - 1
    every = with_node(model, EVERY, calls_per_step=2)
    assert torch.equal(sample(every, sampler=twin.heun), sample(model, sampler=twin.heun))


def test_interface_of_the_node() -> None:
    (kind,) = NODE_CLASS_MAPPINGS.values()
    inputs = kind.INPUT_TYPES()["required"]
    assert inputs["model"] == ("MODEL",)
    defaults = {name: value[1]["default"] for name, value in inputs.items() if name != "model"}
    (patched,) = getattr(kind(), kind.FUNCTION)(model=patcher(), **defaults)
    assert kind.RETURN_TYPES == ("MODEL",)
    assert sample(patched).isfinite().all()
    assert len(trace(patched).computed_steps) < STEPS


class UNet(nn.Module):
    """Its blocks differ from each other."""

    def __init__(self) -> None:
        super().__init__()
        self.input_blocks = nn.ModuleList([nn.Linear(4, 4), nn.Conv1d(4, 4, 1)])

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, **_: Any) -> Tensor:
        return self.input_blocks[0](x.movedim(1, -1)).movedim(-1, 1) * timesteps.view(-1, 1, 1, 1, 1).cos()


def test_planned_paths_need_no_blocks() -> None:
    torch.manual_seed(0)
    model = twin.ModelPatcher(twin.BaseModel(UNet()).requires_grad_(False))
    path = adacache.PlannedPath([1, 2, 5, 8], [0.0, 1.0, 1.0, 1.0], level="branch")
    patched = with_node(model, path)
    assert not torch.equal(sample(patched), sample(model))
    assert trace(patched).computed_steps == [1, 2, 5, 8]


def test_unknown_networks_are_refused() -> None:
    model = twin.ModelPatcher(twin.BaseModel(UNet()))
    with pytest.raises(ValueError, match=r"model: found no list of blocks in .*UNet: expected a"):
        with_node(model, POLICY)
    with pytest.raises(ValueError, match="calls_per_step: expected a whole number of at least 1"):
        with_node(patcher(), POLICY, calls_per_step=0)
    with pytest.raises(ValueError, match="policy"):
        sample(with_node(patcher(), "no/such"))

# SPDX-License-Identifier: Apache-2.0
"""The bytes that a policy keeps on a model, found without running it: a copy of the model on the meta device,
which has shapes but no values, takes a few steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adacache.adapters.spec import ModelSpec
from adacache.policies.base import Decider, Keep, Plan, Policy, Step
from adacache.runtime.clock import Clock, CountingClock
from adacache.runtime.guided import guided_output
from adacache.runtime.outputs import flatten
from adacache.runtime.request import Facts, Request
from adacache.runtime.runner import PlainHost, Runner
from adacache.runtime.store import Store
from adacache.sites import GUIDED, ModelSites, Site


def predicted(
    model: nn.Module,
    spec: ModelSpec,
    policy: Policy,
    wraps: str,
    calls: Sequence[tuple[Sequence[Any], Mapping[str, Any]]],
    *,
    num_steps: int,
    num_videos: int = 1,
    video_of_row: Sequence[int] | None = None,
    change: Callable[[Site, Keep], Keep] = lambda site, keep: keep,
) -> Store:
    """A store as it is after the first step, with tensors on the meta device.

    Args:
        model: is not modified; its weights are not copied.
        spec: its declaration.
        policy: the settings.
        wraps: see `policies.base.wraps_of`.
        calls: (args, kwargs) of each forward call of a step; tensors of any device.
        num_steps, num_videos, video_of_row: see `Request`.
        change: how a site is kept instead.

    Raises:
        RuntimeError: the model does not run on the meta device.
    """
    plain = meta_copy(model)
    host = _Host()
    runner = Runner(host, plain, spec, wraps)
    request = Request(
        _Sizing(policy, change),
        runner.sites,
        num_steps=num_steps,
        num_videos=num_videos,
        video_of_row=video_of_row,
        branches=len(calls),
    )
    host.found = CountingClock(request)
    runner.install()
    try:
        with torch.no_grad():
            # A model that turns out to work between its blocks is cached by block from the second step on.
            while request.step == 0 or (request.step < min(2, num_steps) and runner.works_between):
                for args, kwargs in calls:
                    output = plain(*_to_meta(list(args)), **_to_meta(dict(kwargs)))
                if GUIDED in request.decider.keeps:
                    guided_output(request, flatten(output)[0][0][:num_videos])
    except Exception as error:
        raise RuntimeError(
            f"memory: {type(model).__name__} does not run on the meta device, so its memory cannot be "
            f"predicted: {type(error).__name__}: {error}"
        ) from error
    finally:
        runner.uninstall()
    return request.store


def meta_copy(model: nn.Module) -> Any:
    """The model with parameters and buffers on the meta device; no weight is copied."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        shape = torch.empty_like(tensor, device="meta")
        trained = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(shape, requires_grad=False) if trained else shape
    return _to_meta_attributes(copy.deepcopy(model, memo))


def _to_meta_attributes(model: nn.Module) -> nn.Module:
    """Tensors that modules hold as plain attributes, such as rotary tables."""
    for module in model.modules():
        for name, value in list(module.__dict__.items()):
            if isinstance(value, Tensor):
                module.__dict__[name] = value.to("meta")
    return model


def _to_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, tuple | list):
        return type(value)(_to_meta(one) for one in value)
    if isinstance(value, dict):
        return {key: _to_meta(one) for key, one in value.items()}
    return value


class _Host(PlainHost):
    """The runner's host: one request, no guidance branch by name."""

    found: Clock | None = None

    def clock(self, facts: Facts) -> Clock | None:
        return self.found


class _Sizing:
    """Keeps and watches what a policy does, and computes every step."""

    def __init__(self, policy: Policy, change: Callable[[Site, Keep], Keep]):
        self._policy = policy
        self._change = change

    @property
    def per_video(self) -> bool:
        return self._policy.per_video

    def check(self, sites: ModelSites, num_steps: int) -> None:
        self._policy.check(sites, num_steps)

    def start(self, sites: ModelSites, num_steps: int, num_videos: int, device: torch.device) -> Decider:
        decider = self._policy.start(sites, num_steps, num_videos, torch.device("cpu"))
        return _SizingDecider(decider, self._change)

    def describe(self) -> dict[str, Any]:
        return self._policy.describe()


class _SizingDecider(Decider):
    def __init__(self, decider: Decider, change: Callable[[Site, Keep], Keep]):
        self.keeps = {site: change(site, keep) for site, keep in decider.keeps.items()}
        self.watches, self.signals = decider.watches, decider.signals

    def plan(self, step: Step) -> Plan:
        return Plan()

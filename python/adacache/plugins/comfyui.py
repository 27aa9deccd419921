# SPDX-License-Identifier: Apache-2.0
"""A node for ComfyUI that enables caching on a video model. Put two lines into
`custom_nodes/adacache_node.py`:

    from adacache.plugins.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from adacache.adapters.registry import spec_for
from adacache.api import disable, enable
from adacache.checks import whole
from adacache.policies import Policy
from adacache.policies.base import wraps_of
from adacache.runtime.clock import Calls, Tick
from adacache.runtime.request import Facts, Request

KEY = "adacache"
WRAPPERS = ("outer_sample", "calc_cond_batch", "apply_model")
"""Values of comfy.patcher_extension.WrappersMP; methods of `Sampling`."""


class EvaluationClock:
    """A step is one evaluation of the model by the sampler, with all conditionings in one call or several.
    Reads nothing from the device."""

    def __init__(self, request: Request):
        self.request = request
        self._calls = Calls()
        self._begins = True

    def begin(self) -> None:
        """Begins an evaluation with the next call."""
        if self.request.step >= self.request.num_steps:
            raise RuntimeError(
                f"AdaCache node: the sampler calls the model more than {self.request.num_steps} times; set "
                "calls_per_step to its calls per step, such as 2 for Heun"
            )
        self._begins = True

    def tick(self, facts: Facts) -> Tick:
        calls = Calls() if self._begins else self._calls
        branch = self.request.begin_call(facts, self._begins, calls.add(facts.context))
        self._calls, self._begins = calls, False
        return Tick(self.request, branch)

    def tock(self, tick: Tick) -> None:
        pass


class Sampling:
    """The wrappers of a patched model, and the trace of its latest run. Caching is on during a run only,
    because clones of a patcher share the network."""

    def __init__(self, settings: dict[str, Any], calls_per_step: int):
        self._settings = settings
        self._calls = calls_per_step
        self._handle: Any = None
        self._clock: EvaluationClock | None = None
        self.trace: Any = None

    def outer_sample(self, executor: Any, noise: Any, *args: Any, **kwargs: Any) -> Any:
        """A sampling run; `args` are latent, sampler, sigmas and others."""
        num_steps = (len(args[2]) - 1) * self._calls
        if num_steps < 1:
            return executor(noise, *args, **kwargs)
        network = executor.class_obj.model_patcher.model.diffusion_model
        handle = self._handle = enable(network, num_steps=num_steps, **self._settings)
        try:
            self._clock = EvaluationClock(handle.open_request(num_steps, int(noise.shape[0])))
            with handle.clocked(self._clock):
                return executor(noise, *args, **kwargs)
        finally:
            if self._clock is not None:
                self.trace = self._clock.request.trace
                self._clock.request.close()
            self._handle = self._clock = None
            disable(network)

    def calc_cond_batch(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """An evaluation of the model for all conditionings."""
        if self._clock is not None:
            self._clock.begin()
        return executor(*args, **kwargs)

    def apply_model(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """A call of the network with some of the conditionings."""
        options = kwargs["transformer_options"] if len(args) < 6 else args[5]
        name = str(options.get("uuids") or options.get("cond_or_uncond"))
        with self._handle.named(name) if self._handle is not None else nullcontext():
            return executor(*args, **kwargs)


class AdaCacheNode:
    """Takes a model; returns a clone of it that caches."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "advanced/model"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        policy = "STRING", {"default": "fbcache/fast", "tooltip": "a preset or a file of planned paths"}
        budget = "INT", {"default": 0, "min": 0, "tooltip": "computed steps, with a file of paths"}
        calls = "INT", {"default": 1, "min": 1, "max": 4, "tooltip": "evaluations per step of the sampler"}
        inputs = {"model": ("MODEL",), "policy": policy, "budget": budget, "calls_per_step": calls}
        return {"required": inputs}

    def patch(
        self, model: Any, policy: Policy | str | Path, budget: int = 0, calls_per_step: int = 1
    ) -> tuple[Any]:
        """Runs the node.

        Args:
            policy, budget: see `adacache.enable`; 0: none.
            calls_per_step: of the model by the sampler: 1 for Euler, 2 for Heun.

        Raises:
            ValueError: the network is not a transformer whose blocks can be found.
        """
        whole(1)(calls_per_step, "calls_per_step")
        network = model.get_model_object("diffusion_model")
        blocks = wraps_of(policy) == "blocks" if hasattr(policy, "start") else not Path(policy).is_file()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `enable` repeats the warning about undeclared models
            spec_for(network, blocks=blocks)
        sampling = Sampling({"policy": policy, "budget": budget or None}, calls_per_step)
        patched = model.clone()
        for kind in WRAPPERS:
            patched.remove_wrappers_with_key(kind, KEY)  # of a node before this one
            patched.add_wrapper_with_key(kind, KEY, getattr(sampling, kind))
        patched.set_attachments(KEY, sampling)
        return (patched,)


NODE_CLASS_MAPPINGS = {"AdaCache": AdaCacheNode}
NODE_DISPLAY_NAME_MAPPINGS = {"AdaCache": "AdaCache"}

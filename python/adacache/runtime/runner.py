# SPDX-License-Identifier: Apache-2.0
"""The executor of a model's forward calls: wraps the model, finds the plan of each call, and runs it."""

from __future__ import annotations

import functools
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from adacache.adapters.spec import Arguments, ModelSpec, Spared
from adacache.interpose import interpose, plain_class, restore
from adacache.policies.base import What
from adacache.runtime.accelerated import how_blocks_run
from adacache.runtime.clock import Clock
from adacache.runtime.compiled import apart, compiles_whole, skip_frames
from adacache.runtime.forward import Call, Forward, segments
from adacache.runtime.fused_forward import run_program
from adacache.runtime.one_graph import Graph, OneGraphForward, refusal
from adacache.runtime.outputs import KeptOutput, flatten
from adacache.runtime.request import Facts
from adacache.runtime.store import as_tokens
from adacache.runtime.wrapped_block import OWNER, WrappedBlock
from adacache.runtime.wrapped_forward import WrappedForward
from adacache.sites import LATENTS, MODEL, ModelSites

Entry = Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]
"""(block, *args, **kwargs) -> its arguments."""
_UNDER_WAY: ContextVar[_Running | None] = ContextVar("adacache_forward", default=None)


class Host(Protocol):
    """What the runner needs of the handle."""

    def clock(self, facts: Facts) -> Clock | None:
        """The clock of a call; None: it runs without caching."""

    def context(self) -> str | None:
        """Name of the guidance branch, if the pipeline states it."""

    def named(self, name: str) -> AbstractContextManager[None]:
        """Calls inside belong to the guidance branch `name`."""

    def generation(self, num_steps: int, num_videos: int) -> AbstractContextManager[Any]:
        """Calls inside are one generation of a sampler."""

    def check_call(self, policy: Any, facts: Facts) -> None:
        """Warns if the policy was made for other inputs than those of a call."""


class PlainHost:
    """A host without guidance branches by name and without a sampler of its own."""

    def clock(self, facts: Facts) -> Clock | None:
        raise NotImplementedError

    def context(self) -> str | None:
        return None

    def named(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()

    def generation(self, num_steps: int, num_videos: int) -> AbstractContextManager[None]:
        return nullcontext()

    def check_call(self, policy: Any, facts: Facts) -> None:
        pass


class Runner:
    """Runs the forward calls of one model.

    Args:
        wraps: see `policies.base.wraps_of`.
        tier: of block programs, see `fused.TIERS`; None: blocks run their own forward.
        entries: per block, what changes its arguments before anything else.

    Attributes:
        model, spec, sites: what is run.
        on: whether caching is enabled.
    """

    def __init__(
        self,
        host: Host,
        model: Any,
        spec: ModelSpec,
        wraps: str = "blocks",
        tier: str | None = "exact",
        entries: Mapping[Any, Entry] = MappingProxyType({}),
    ):
        self.host = host
        self.entries = entries
        self.tier = tier
        self.wraps_blocks = wraps == "blocks"
        self.model = model
        self.spec = spec
        self.sites: ModelSites = spec.sites(model) if self.wraps_blocks else ModelSites(())
        self.on = False
        self.always_compute = False
        self.blocks: list[WrappedBlock] = []
        self.graph: Graph | None = None
        """Of the call that runs as one graph."""
        self._one_graph = threading.Lock()
        self._between = spec.between
        self._interposed: list[Any] = []

    # Installing.

    def install(self, wrapper: Any = None) -> None:
        """Wraps the model, its blocks, and what `torch.compile` has wrapped around the model, which captured
        its `__call__`."""
        kind = type(self.model)
        forward = apart(functools.partial(self._run_model, inspect.signature(kind.forward)))
        methods: dict[str, Callable[..., Any]] = {"__call__": forward}
        if wrapper is not None:
            self._interpose(wrapper, methods)
        if hasattr(kind, "forward_with_cfg"):
            # Samplers call this, or the model's forward, without its __call__.
            methods["forward"] = forward
            signature = inspect.signature(kind.forward_with_cfg)
            methods["forward_with_cfg"] = apart(functools.partial(self._run_model, signature))
        if hasattr(kind, "cache_context"):
            methods["cache_context"] = self._note_context
        if hasattr(kind, "generation"):
            methods["generation"] = self._open_generation
        if self.spec.program is not None and self.wraps_blocks:
            methods[self.spec.program.method] = apart(self._run_stack, self._trace_stack, self._traces)
        self._interpose(self.model, methods)
        skip_frames(type(self.model).__call__)
        if self.spec.program is None and self.wraps_blocks:
            run_block = apart(self._run_block, self._trace_block, self._traces)
            for place in self.spec.places(self.model):
                program = None if self.tier is None else self.spec.block_program
                block = WrappedBlock(self.spec, place, program)
                self.blocks.append(block)
                place.module.__dict__[OWNER] = block
                self._interpose(place.module, {"__call__": run_block})
            for spared in self.spec.spared:
                child = _child(self.model, spared.child)
                if child is not None:
                    run = apart(
                        functools.partial(self._run_spared, spared),
                        functools.partial(self._trace_spared, spared),
                        self._traces,
                    )
                    self._interpose(child, {"__call__": run})
        self.on = True

    def _interpose(self, thing: Any, methods: Mapping[str, Callable[..., Any]]) -> None:
        interpose(thing, dict(methods))
        self._interposed.append(thing)

    def uninstall(self) -> None:
        """Unwraps all that `install` wrapped, whatever has changed since."""
        self.on = False
        for block in self.blocks:
            block.release_children()
        changed = []
        for thing in reversed(self._interposed):
            thing.__dict__.pop(OWNER, None)
            if not restore(thing):
                changed.append(type(thing).__name__)
        self._interposed.clear()
        self.blocks.clear()
        if changed:
            warnings.warn(
                f"AdaCache: the class of {sorted(set(changed))} was changed after AdaCache was enabled; it "
                "is disabled there, but the class stays",
                stacklevel=4,
            )

    def how_blocks_run(self) -> dict[str, Any]:
        """See `Handle.describe`."""
        if not self.wraps_blocks:
            return {"runs": "whole model", "tier": None}
        if self.spec.program is not None:
            return {"runs": type(self.spec.program).__name__, "tier": "exact"}
        return how_blocks_run(self.blocks, self.tier)

    # What the wrapped methods do.

    def _run_model(
        self, signature: inspect.Signature, plain: Callable[..., Any], model: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """The model's `__call__`."""
        running = _UNDER_WAY.get()
        if not self.on or (running is not None and running.runner is self):
            return plain(model, *args, **kwargs)  # a wrapper of the model has called
        given = dict(signature.bind(model, *args, **kwargs).arguments)
        given.update(given.pop("kwargs", {}))
        facts = self._facts(given)
        clock = self.host.clock(facts)
        if clock is None:
            return plain(model, *args, **kwargs)
        running = _Running(self, clock, facts, given)
        token = _UNDER_WAY.set(running)
        try:
            if running.one_graph(compiles_whole(plain, model)):
                with self._one_graph:
                    output = running.run_graph(lambda: plain(model, *args, **kwargs))
            elif not self.wraps_blocks:
                output = running.whole(lambda: plain(model, *args, **kwargs), [*args, *kwargs.values()])
            else:
                if self.spec.reuse_arguments and running.spares():
                    args, kwargs = _with_arguments(signature, args, kwargs, self.spec.reuse_arguments)
                output = plain(model, *args, **kwargs)
            running.finish()
        except BaseException as error:
            running.fail(error)
            raise
        finally:
            _UNDER_WAY.reset(token)
        return output

    def _facts(self, given: Arguments) -> Facts:
        latents, timestep = given[self.spec.latents], given[self.spec.timestep]
        tensors = list(latents) if isinstance(latents, tuple | list) else [latents]
        if not all(isinstance(x, Tensor) for x in tensors):
            raise ValueError(f"{self.spec.latents}: expected a tensor, got {type(latents).__name__}")
        if torch.is_grad_enabled() and (
            any(x.requires_grad for x in tensors) or any(p.requires_grad for p in self.model.parameters())
        ):
            raise RuntimeError("AdaCache is for inference only: call the model under torch.no_grad()")
        shape = tuple(tensors[0].shape)
        if tensors[0] is not latents:
            shape = (len(tensors), *shape)
        # A call that makes the model write keys and values of its own may not be skipped.
        writes = any(
            "cache" in name.split("_") and value is not None and not isinstance(value, bool | int)
            for name, value in given.items()
        )
        return Facts(shape, tensors[0].device, timestep, self.host.context(), writes)

    def _run_stack(self, plain: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
        """The method of a model with a fused program that runs its blocks."""
        running = _UNDER_WAY.get()
        program = self.spec.program
        if program is None or running is None or running.runner is not self:
            return plain(model, *args, **kwargs)
        tokens, context = program.enter(model, *args, **kwargs)
        running.frames = program.frames(context)
        return run_program(running.forward(), program, model, tokens, context)

    def _run_block(self, plain: Callable[..., Any], module: Any, *args: Any, **kwargs: Any) -> Any:
        """A wrapped block's `__call__`."""
        running, block = _UNDER_WAY.get(), module.__dict__.get(OWNER)
        if self.entries and (entry := self.entries.get(module)) is not None:
            args, kwargs = entry(module, *args, **kwargs)
        if block is None or running is None or running.runner is not self:
            return plain(module, *args, **kwargs)
        forward = running.wrapped
        if forward is None:
            running.forward()
            forward = running.wrapped
            assert forward is not None
        return forward.run_block(block, plain, args, kwargs)

    def _run_spared(
        self, spared: Spared, plain: Callable[..., Any], child: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """The `__call__` of a child that only feeds the blocks."""
        running = _UNDER_WAY.get()
        if running is None or running.runner is not self or kwargs or not running.skips(spared, args):
            return plain(child, *args, **kwargs)
        return spared.output(child, *args)

    # What torch.compile traces in place of the wrapped methods, where a call is one graph.

    def _traces(self) -> bool:
        return self.graph is not None

    def _trace_block(self, plain: Callable[..., Any], module: Any, *args: Any, **kwargs: Any) -> Any:
        assert self.graph is not None
        return self.graph.run_block(module.__dict__[OWNER], plain, module, args, kwargs)

    def _trace_stack(self, plain: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
        program = self.spec.program
        assert self.graph is not None
        assert program is not None
        return self.graph.run_stack(program, model, *program.enter(model, *args, **kwargs))

    def _trace_spared(
        self, spared: Spared, plain: Callable[..., Any], child: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if self.graph is None or not self.graph.skips or kwargs:
            return plain(child, *args, **kwargs)
        return spared.output(child, *args)

    def run_child(self, plain: Callable[..., Any], module: Any, *args: Any, **kwargs: Any) -> Any:
        """A wrapped child's `__call__`."""
        if torch.compiler.is_compiling() and self.graph is not None:
            return plain(module, *args, **kwargs)
        running, owner = _UNDER_WAY.get(), module.__dict__.get(OWNER)
        if owner is None or running is None or running.runner is not self:
            return plain(module, *args, **kwargs)
        forward = running.forward()
        assert isinstance(forward, WrappedForward)
        block, name = owner
        return forward.run_child(block, name, plain, module, args, kwargs)

    @contextmanager
    def _note_context(self, plain: Callable[..., Any], model: Any, name: str, **kwargs: Any) -> Iterator[Any]:
        with self.host.named(name), plain(model, name, **kwargs) as value:
            yield value

    def _open_generation(
        self, plain: Callable[..., Any], model: Any, *, num_steps: int, num_videos: int
    ) -> AbstractContextManager[Any]:
        return self.host.generation(num_steps, num_videos)

    @property
    def works_between(self) -> bool:
        """Whether the model is known to modify tokens between its blocks."""
        return self._between

    def found_between(self) -> None:
        """The model modifies tokens between its blocks: residuals are stored by block from now on."""
        if not self._between:
            self._between = True
            warnings.warn(
                f"AdaCache: {plain_class(self.model).__name__} modifies tokens between its blocks, so one "
                "residual is stored per block instead of one for the stack; a model declaration of its own "
                "can avoid that (docs/adding_a_model.md)",
                stacklevel=2,
            )

    def found_unknown_output(self, block: str) -> None:
        """A block cannot be skipped: every step is computed from now on."""
        if not self.always_compute:
            self.always_compute = True
            warnings.warn(
                f"AdaCache: {block} returns a tensor that is none of its arguments, so it cannot be skipped "
                "and every step is computed; a model declaration can say what to keep "
                "(docs/adding_a_model.md)",
                stacklevel=2,
            )


class _Running:
    """A forward call from the model's `__call__` on. The clock advances when its first block runs, so that
    arguments that the model refuses do not count as a step."""

    def __init__(self, runner: Runner, clock: Clock, facts: Facts, given: Arguments):
        self.runner = runner
        self.frames = 0
        self._clock = clock
        self._facts = facts
        self._given = given
        self._compiled = False
        self._forward: Forward | None = None
        self.wrapped: WrappedForward | None = None
        """The same, of a model whose blocks are wrapped; None before it has begun."""

    def forward(self) -> Forward:
        if self._forward is None:
            runner = self.runner
            tick = self._clock.tick(self._facts)
            if tick.request.step == 1:
                runner.host.check_call(tick.request.policy, self._facts)
            keeps = tick.request.decider.keeps
            call = Call(
                tick,
                segments(keeps, len(runner.sites.blocks), runner._between),
                self._facts.shape[0],
                self.frames or runner.spec.latent_frames(runner.model, self._given),
                self._facts.device,
                self._facts.must_compute or runner.always_compute,
            )
            if self._compiled and runner.wraps_blocks and refusal(call, runner.spec, runner.blocks) is None:
                blocks, tier = len(runner.sites.blocks), runner.tier or "exact"
                self._forward = OneGraphForward(call, runner.spec, blocks, tier, self._given)
            elif runner.spec.program is None and runner.wraps_blocks:
                self._forward = self.wrapped = WrappedForward(
                    runner, runner.spec, call, runner.tier or "exact"
                )
            else:
                self._forward = Forward(call)
            self._tick = tick
            self._forward.meter.measure(LATENTS, self._latents)
        return self._forward

    def _latents(self) -> Tensor:
        latents = self._given[self.runner.spec.latents]
        return latents if isinstance(latents, Tensor) else torch.stack(list(latents))

    def spares(self) -> bool:
        """Whether this call reuses the whole stack, so that it runs with the spec's `reuse_arguments`."""
        forward = self.forward()
        assert isinstance(forward, WrappedForward)
        forward.spared = forward.reuses_all()
        return forward.spared

    def skips(self, spared: Spared, args: Sequence[Any]) -> bool:
        """Whether this call skips all blocks, so that a child which only feeds them need not run."""
        forward = self.forward()
        if any(signal.part != LATENTS.part for signal in forward.meter.signals):
            return False  # they are measured at the first block, and may revise the plan
        if spared.stream is not None and not forward.fits_stream(spared.stream, args[0]):
            return False
        if not forward.reuses_all():
            return False
        forward.must_reuse = True
        return True

    def whole(self, compute: Callable[[], Any], inputs: list[Any]) -> Any:
        """The output of the model, where its own call is the only thing that is wrapped."""
        forward = self.forward()
        request = forward.request
        if MODEL not in request.decider.keeps:
            return compute()

        def computed() -> Any:
            request.note_computed([True] * request.decisions)
            output = compute()
            if MODEL in forward.meter.watches:
                first = flatten(output)[0][0]
                # A copy, because a sampler may modify its output in place.
                forward.meter.residual(MODEL, as_tokens(first).clone(), None)
            return output

        residual = request.decider.keeps[MODEL].what is What.RESIDUAL
        return KeptOutput(forward, MODEL, self._latents() if residual else None).run(computed, inputs)

    def one_graph(self, compiled: bool) -> bool:
        """Whether this call runs as one graph; `compiled`: whether it runs compiled as a whole."""
        self._compiled = compiled and not self.runner.entries
        return self._compiled and isinstance(self.forward(), OneGraphForward)

    def run_graph(self, run: Callable[[], Any]) -> Any:
        """The output of the model, which runs as one graph."""
        forward = self.forward()
        assert isinstance(forward, OneGraphForward)
        forward.prepare()
        self.runner.graph = forward.graph
        try:
            return run()
        finally:
            self.runner.graph = None

    def finish(self) -> None:
        forward = self.forward()
        forward.finish()
        if forward.works_between:
            self.runner.found_between()
        if isinstance(forward, WrappedForward) and forward.unknown_output is not None:
            self.runner.found_unknown_output(forward.unknown_output)
        request = self._tick.request
        if self._tick.branch.index == 0:
            request.decider.finished(request.current_step, request.store)
        self._clock.tock(self._tick)

    def fail(self, error: BaseException) -> None:
        if self._forward is not None:
            self._tick.request.end(f"{type(error).__name__}: {error}")


def _child(model: Any, name: str) -> Any:
    """A child of a model by its path; None: it has none."""
    for part in name.split("."):
        model = getattr(model, part, None)
    return model


def _with_arguments(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any], changed: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, with some of them changed."""
    left = dict(changed)
    names = list(signature.parameters)[1:]
    args = tuple(left.pop(name, value) for name, value in zip(names, args, strict=False))
    return args, {**kwargs, **left}

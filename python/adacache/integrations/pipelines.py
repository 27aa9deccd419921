# SPDX-License-Identifier: Apache-2.0
"""Caching in a pipeline such as diffusers': one request per loop of its scheduler."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from adacache.handle import Handle
from adacache.interpose import STATE, interpose, restore
from adacache.runtime.clock import Calls, Tick, TimestepClock
from adacache.runtime.guided import guided_output
from adacache.runtime.request import Facts, Request
from adacache.trace import Trace

ATTRIBUTE = f"{STATE}_pipeline"
TRANSFORMERS = ("transformer", "transformer_2", "dit", "denoiser", "model")
"""Names that pipelines give their transformers."""
UNETS = ("unet",)
"""Names of models without blocks in a row, for policies that wrap none."""

_RUN: ContextVar[PipelineRun | None] = ContextVar("adacache_run", default=None)


def transformers(pipeline: Any, unets: bool = True) -> dict[str, nn.Module]:
    """The transformers of a pipeline by name, and its UNet if it has no transformer."""
    found = {name: getattr(pipeline, name, None) for name in TRANSFORMERS}
    if unets and not any(isinstance(module, nn.Module) for module in found.values()):
        found = {name: getattr(pipeline, name, None) for name in UNETS}
    return {name: module for name, module in found.items() if isinstance(module, nn.Module)}


def is_pipeline(thing: Any, unets: bool = False) -> bool:
    """Whether a thing is not a model but has one under a name that pipelines use; `unets`: a UNet counts.

    Raises:
        ValueError: it looks like a pipeline, but lacks what caching needs.
    """
    if isinstance(thing, nn.Module) or thing is None:
        return False
    if not transformers(thing, unets):
        modules = [name for name, value in getattr(thing, "components", {}).items() if value is not None]
        if not modules:
            return False
        raise ValueError(
            f"model: found no transformer in {type(thing).__name__} under {list(TRANSFORMERS)}; it has "
            f"{modules}"
        )
    missing = [name for name in ("scheduler", "__call__") if not hasattr(thing, name)]
    if missing:
        raise ValueError(
            f"model: {type(thing).__name__} has a transformer but no {' and no '.join(missing)}, so it is "
            "not a pipeline; pass the transformer itself"
        )
    return True


class PipelineHandle:
    """Caching at work on a pipeline. Made by `adacache.enable`.

    Args:
        pipeline: has a scheduler and transformers.
        enable, release: for one transformer.

    Attributes:
        handles: the handle of each transformer, by its name in the pipeline.
    """

    def __init__(
        self, pipeline: Any, enable: Callable[[nn.Module], Handle], release: Callable[[Handle], None]
    ):
        self.pipeline = pipeline
        self.handles: dict[str, Handle] = {}
        self._release = release
        self._latest: PipelineRun | None = None
        try:
            for name, transformer in transformers(pipeline).items():
                self.handles[name] = enable(transformer)
        except BaseException:
            for handle in self.handles.values():
                release(handle)
            raise
        pipeline.__dict__[ATTRIBUTE] = self
        methods: dict[str, Callable[..., Any]] = {"__call__": self._call}
        if hasattr(pipeline, "prepare_latents"):
            signature = inspect.signature(type(pipeline).prepare_latents)
            methods["prepare_latents"] = functools.partial(self._prepare_latents, signature)
        interpose(pipeline, methods)

    @property
    def sites(self) -> list[str]:
        """Names of the sites at which residuals are formed, in the order they run."""
        if len(self.handles) == 1:
            return next(iter(self.handles.values())).sites
        return [f"{name}.{site}" for name, handle in self.handles.items() for site in handle.sites]

    @property
    def traces(self) -> dict[str, Trace]:
        """The trace of each transformer that ran in the latest call.

        Raises:
            RuntimeError: nothing has run yet.
        """
        run = self._latest
        if run is None:
            raise RuntimeError("trace: no generation call has run since AdaCache was enabled")
        return {name: run.requests[h].trace for name, h in self.handles.items() if h in run.requests}

    @property
    def trace(self) -> Trace:
        """The trace of the latest call; of two transformers, one after the other.

        Raises:
            RuntimeError: nothing has run yet.
        """
        traces = self.traces
        if not traces:
            raise RuntimeError("trace: the pipeline's call ended before a transformer ran")
        if self._latest is not None and self._latest.guided is not None:
            return next(iter(traces.values()))  # all transformers share one request
        return functools.reduce(Trace.followed_by, traces.values())

    def memory(self) -> int:
        """Bytes that all calls under way keep now. Before a call: `handles[name].predict_memory`."""
        return sum(handle.memory() for handle in self.handles.values())

    def describe(self) -> dict[str, Any]:
        """What was matched, per transformer; see `Handle.describe`."""
        return {name: handle.describe() for name, handle in self.handles.items()}

    def disable(self) -> None:
        restore(self.pipeline)
        self.pipeline.__dict__.pop(ATTRIBUTE, None)
        for handle in self.handles.values():
            self._release(handle)

    def _call(self, plain: Callable[..., Any], pipeline: Any, *args: Any, **kwargs: Any) -> Any:
        for name, handle in self.handles.items():
            if getattr(pipeline, name, None) is not handle.model:
                handle.warn(
                    "exchanged",
                    f"the pipeline's {name} was exchanged after AdaCache was enabled, so it runs without "
                    "caching; disable and enable the pipeline again",
                )
        run = self._latest = PipelineRun(pipeline, list(self.handles.values()))
        if run.grid is not None and not hasattr(pipeline.scheduler, "set_timesteps"):
            raise ValueError(
                "policy: the pipeline's scheduler has no set_timesteps, so it keeps all timesteps"
            )
        token = _RUN.set(run)
        scheduler = pipeline.scheduler
        # A pipeline may copy its scheduler: the steps of the copies count too.
        interpose(scheduler, {"step": _note_step, "set_timesteps": _note_loop}, copies=True)
        try:
            with contextlib.ExitStack() as stack:
                for handle in self.handles.values():
                    stack.enter_context(handle.clocked(SchedulerClock(run, handle)))
                return plain(pipeline, *args, **kwargs)
        finally:
            restore(scheduler)
            _RUN.reset(token)
            run.close()

    def _prepare_latents(
        self,
        signature: inspect.Signature,
        plain: Callable[..., Any],
        pipeline: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        given = signature.bind(pipeline, *args, **kwargs)
        given.apply_defaults()
        run, batch = _RUN.get(), given.arguments.get("batch_size")
        if run is not None and isinstance(batch, int):
            run.num_videos = batch
        return plain(pipeline, *args, **kwargs)


class PipelineRun:
    """One call of a pipeline.

    Attributes:
        step: steps that the scheduler has taken in this loop.
        loop: loops that the scheduler has begun.
        num_videos: rows of the latents, once they are made.
        requests: the latest request of each transformer.
        grid: the timesteps that the scheduler keeps; None: all.
        guided: the request whose guided output is kept, if any; all transformers share it.
        stream: how many outputs the scheduler has got since the model ran.
    """

    def __init__(self, pipeline: Any, handles: list[Handle]):
        self.pipeline = pipeline
        self.handles = handles
        self.step = 0
        self.loop = 0
        self.num_videos: int | None = None
        self.requests: dict[Handle, Request] = {}
        self.grid = handles[0].grid
        self.guided: Request | None = None
        self.stream = 0
        self._before: tuple[int | None, int | None] = (None, None)
        self._guided_loop = 0

    def begin_loop(self) -> None:
        """Notes that the scheduler is about to begin a loop."""
        if self.step:
            self.loop, self.step, self._before = self.loop + 1, 0, self._lengths()

    def _lengths(self) -> tuple[int | None, int | None]:
        """Steps of the loop by the scheduler, and as the pipeline states them."""
        timesteps = getattr(self.pipeline.scheduler, "timesteps", None)
        return None if timesteps is None else len(timesteps), getattr(self.pipeline, "_num_timesteps", None)

    def loop_steps(self) -> int | None:
        """Steps of the scheduler's loop; None: unknown. A pipeline may run some of the scheduler's timesteps
        only, and then states how many; what it stated for an earlier loop does not count."""
        scheduled, stated = self._lengths()
        stale = stated == self._before[1] and scheduled != self._before[0] and self.loop > 0
        if stated is None or stale or (scheduled is not None and stated > scheduled):
            return scheduled
        return int(stated)

    def steps_left(self, handle: Handle) -> int | None:
        """Steps of the loop that one transformer will run, at its first call in the loop; None: unknown."""
        steps = self.loop_steps()
        if steps is None:
            return None
        left = steps - self.step
        boundary = getattr(getattr(self.pipeline, "config", None), "boundary_ratio", None)
        if len(self.handles) > 1 and boundary is not None and handle is self.handles[0]:
            # The first of two transformers runs the steps above the boundary. Read once, before they run.
            scheduler = self.pipeline.scheduler
            threshold = boundary * scheduler.config.num_train_timesteps
            timesteps = scheduler.timesteps[-steps:].tolist()
            left = sum(timestep >= threshold for timestep in timesteps[self.step :])
        return max(1, left)

    def videos_of(self, rows: int, in_branch: bool, handle: Handle) -> int:
        """Videos in a batch of so many rows; `in_branch`: the call is one of a named guidance branch, which
        has one row per video."""
        rows_per_video = handle.rows_per_video or (1 if in_branch and self.num_videos is None else None)
        if rows_per_video is not None and rows % rows_per_video == 0:
            return rows // rows_per_video
        if self.num_videos is not None and rows % self.num_videos == 0:
            return self.num_videos
        if rows > 1:
            handle.warn(
                "videos",
                f"the pipeline does not state how many videos its {rows} rows are, so there is one decision "
                "for all of them; pass rows_per_video to adacache.enable",
            )
        return 1

    def open(self, handle: Handle, num_steps: int, rows: int, in_branch: bool = False) -> Request:
        """Begins the request of a transformer."""
        if handle in self.requests:
            self.requests[handle].close()
        elif handle.num_steps is not None and self.grid is None and handle.num_steps != num_steps:
            raise ValueError(
                f"num_steps: AdaCache is enabled for {handle.num_steps} steps, the pipeline runs {num_steps}"
            )
        shared = self.guided
        if shared is not None and self._guided_loop == self.loop and not shared.closed:
            self.requests[handle] = shared
            return shared
        in_pipeline = handle.wraps == "guided"
        request = handle.open_request(
            num_steps, self.videos_of(rows, in_branch, handle), in_pipeline=in_pipeline
        )
        handle.check_scheduler(request.policy, self.pipeline.scheduler)
        if in_pipeline:
            self.guided, self._guided_loop = request, self.loop
        self.requests[handle] = request
        return request

    def take_step(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Notes a step of the scheduler; returns its arguments, with the guided output to use."""
        self.step += 1
        request, stream = self.guided, self.stream
        self.stream += 1
        if request is None or request.step == 0 or request.closed or request.ended_by is not None:
            return args, kwargs
        name = "model_output"
        output = args[0] if args else kwargs.get(name)
        if not isinstance(output, Tensor):
            raise ValueError(
                f"level: expected a tensor as the first argument of the scheduler's step, got "
                f'{type(output).__name__}; use level="branch"'
            )
        output = guided_output(request, output, stream)
        return ((output, *args[1:]), kwargs) if args else (args, {**kwargs, name: output})

    def close(self) -> None:
        for request in self.requests.values():
            request.close()


def _note_step(plain: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    run = _RUN.get()
    if run is not None:
        args, kwargs = run.take_step(args, kwargs)
    return plain(scheduler, *args, **kwargs)


def _note_loop(plain: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    run = _RUN.get()
    if run is None:
        return plain(scheduler, *args, **kwargs)
    run.begin_loop()
    result = plain(scheduler, *args, **kwargs)
    if run.grid is not None:
        run.grid.select(scheduler)
    return result


class SchedulerClock:
    """Counts the steps that a pipeline's scheduler takes; reads no timestep.

    Calls between two scheduler steps are branches of one step: of guidance, or of parts of a long clip. Where
    the scheduler is not the pipeline's own, so that its steps are not seen, timesteps are read instead.
    """

    def __init__(self, run: PipelineRun, handle: Handle):
        self._run = run
        self._handle = handle
        self._request: Request | None = None
        self._calls = Calls()
        self._seen = (-1, -1)
        self._blind: TimestepClock | None = None
        self._first: Facts | None = None
        """The loop's first call, until the scheduler has taken a step."""

    def tick(self, facts: Facts) -> Tick:
        if self._blind is not None or self._scheduler_is_unseen(facts):
            return self._tick_by_timestep(facts)
        run = self._run
        run.stream = 0
        now = (run.loop, run.step)
        request, calls = self._request, self._calls
        new_step = request is None or now != self._seen
        if new_step:
            over = request is not None and request.step >= request.num_steps
            another = (
                now[0] != self._seen[0] or over or (request is not None and not request.fits(facts.shape[0]))
            )
            if request is None or another:
                request = self._open(facts)
            calls = Calls()
        assert request is not None
        branch = request.begin_call(facts, new_step, calls.add(facts.context))
        self._request, self._calls, self._seen = request, calls, now
        return Tick(request, branch)

    def _open(self, facts: Facts) -> Request:
        run = self._run
        first = self._handle not in run.requests and self._handle.wraps != "guided"
        num_steps = run.steps_left(self._handle) if first else run.loop_steps()
        if num_steps is None:
            raise RuntimeError(
                "num_steps: neither the pipeline nor its scheduler states them; open a request yourself "
                "(handle.request)"
            )
        return run.open(self._handle, num_steps, facts.shape[0], facts.context is not None)

    def _scheduler_is_unseen(self, facts: Facts) -> bool:
        """Whether the timestep moves on while the scheduler does not."""
        if self._run.step or self._run.loop:
            return False
        if self._first is None:
            self._first = facts
            return False
        return facts.read_timestep() != self._first.read_timestep()

    def _tick_by_timestep(self, facts: Facts) -> Tick:
        if self._handle.wraps == "guided":
            raise RuntimeError(
                "level: the pipeline does not use its own scheduler, so its guided output cannot be "
                'replaced; use a planned path with level="branch"'
            )
        if self._blind is None:
            assert self._request is not None
            assert self._first is not None
            self._handle.warn(
                "timesteps",
                "the pipeline does not use its own scheduler, so steps are recognized by reading timesteps, "
                "which waits for the device",
            )
            steps = self._request.num_steps
            self._blind = TimestepClock(lambda rows: self._run.open(self._handle, steps, rows))
            self._blind.adopt(self._request, self._first, self._calls)
        return self._blind.tick(facts)

    def tock(self, tick: Tick) -> None:
        if self._blind is not None:
            self._blind.tock(tick)

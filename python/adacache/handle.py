"""Switching AdaCache on and off for a model or a pipeline, and telling one generation call from the next."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adacache.adapters import Adapter, BlockAdapter, GenericAdapter, Pass, adapter_for
from adacache.pipelines import PipelineHandle, PipelineRun, is_pipeline
from adacache.policies import Policy, StackInfo, preset
from adacache.request import Call, Request
from adacache.trace import Trace

_ATTRIBUTE = "_adacache_handle"
FEW_STEPS = 8
"""Up to so many steps there is little to be gained."""


def enable(
    model: Any,
    policy: Policy | str | Path,
    *,
    num_steps: int | None = None,
    rows_per_video: int | None = None,
) -> Any:
    """Switches AdaCache on; every generation call is then one request.

    Args:
        model: a video diffusion transformer, or a pipeline that holds one or two of them (such as
            diffusers'): a class that an adapter knows (`adacache.known_models()`), or any whose blocks stand
            in lists.
        policy: settings such as `AdaCache(...)`, the name of a preset (`adacache.preset_names()`), or the
            path of a file that `adacache calibrate` wrote.
        num_steps: denoising steps that the sampler runs. A pipeline's scheduler knows them: then None.
        rows_per_video: rows of the batch that belong to one video, for calls outside `handle.request()` and
            pipelines: 2 with guidance in one batch, 1 without; None: 2 if the batch is even.

    Returns:
        A handle with `trace`, `request()` and `sites`; a `PipelineHandle` for a pipeline.

    Raises:
        ValueError: no block list is found, an unknown preset, settings that do not fit the model or the
            schedule, or AdaCache is enabled already.
    """
    if is_pipeline(model):
        return PipelineHandle(
            model,
            lambda transformer: enable_model(transformer, policy, num_steps, rows_per_video, True),
            disable,
        )
    return enable_model(model, policy, num_steps, rows_per_video, False)


def enable_model(
    model: nn.Module,
    policy: Policy | str | Path,
    num_steps: int | None,
    rows_per_video: int | None,
    piped: bool,
) -> Handle:
    """`enable` for one transformer; `piped` if a pipeline will tell the steps."""
    wrapper, model = _unwrapped(model)
    if _ATTRIBUTE in model.__dict__:
        raise ValueError("model: AdaCache is enabled on it already; call adacache.disable(model) first")
    if num_steps is None and not piped:
        raise ValueError(
            "num_steps: expected the number of denoising steps, got None (a pipeline would know it)"
        )
    handle = Handle(model, adapter_for(model), policy, num_steps, rows_per_video)
    if isinstance(handle.adapter, BlockAdapter):
        handle.wrapper = wrapper
        handle.adapter.install(model, handle, wrapper)
    else:
        model.__dict__["forward"] = handle.forward
    model.__dict__[_ATTRIBUTE] = handle
    return handle


def disable(model: Any) -> None:
    """Switches AdaCache off: the model is as it was, bit for bit. The handle's last trace stays readable.

    Raises:
        ValueError: AdaCache is not enabled on the model or pipeline.
    """
    if is_pipeline(model):
        PipelineHandle.of(model).disable()
        return
    _, model = _unwrapped(model)
    if _ATTRIBUTE not in model.__dict__:
        raise ValueError("model: AdaCache is not enabled on it")
    handle: Handle = model.__dict__[_ATTRIBUTE]
    if isinstance(handle.adapter, BlockAdapter):
        handle.adapter.uninstall(model, handle.wrapper)
    elif handle.replaced_forward is None:
        del model.__dict__["forward"]
    else:
        model.__dict__["forward"] = handle.replaced_forward
    del model.__dict__[_ATTRIBUTE]
    handle.on = False
    handle.reset()


def _unwrapped(model: Any) -> tuple[Any, Any]:
    """What torch.compile has wrapped a model in, or None, and the model."""
    inner = getattr(model, "_orig_mod", None)
    return (None, model) if inner is None else (model, inner)


@contextlib.contextmanager
def request_for(model: nn.Module, *, num_steps: int, num_videos: int) -> Iterator[Request | None]:
    """Opens a request if AdaCache is enabled on the model and none is open; samplers wrap their loop in it.

    Raises:
        ValueError: AdaCache was enabled for another number of steps.
    """
    handle: Handle | None = model.__dict__.get(_ATTRIBUTE)
    if handle is None or handle.current is not None:
        yield None
        return
    if handle.num_steps != num_steps:
        raise ValueError(
            f"num_steps: AdaCache is enabled for {handle.num_steps} steps, the sampler runs {num_steps}"
        )
    with handle.request(num_videos=num_videos) as request:
        yield request


class Handle:
    """AdaCache at work on one model. Made by `enable`."""

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter | BlockAdapter,
        policy: Policy | str | Path,
        num_steps: int | None,
        rows_per_video: int | None,
    ):
        if rows_per_video is not None and rows_per_video < 1:
            raise ValueError(f"rows_per_video: expected at least 1, got {rows_per_video}")
        self.model = model
        self.adapter = adapter
        self.num_steps = num_steps
        self.rows_per_video = rows_per_video
        self.replaced_forward = model.__dict__.get("forward")
        """A forward that stood on the model itself rather than on its class, for `disable`."""
        self.stack: StackInfo = adapter.stack(model)
        self.wrapper: Any = None
        """What torch.compile has wrapped the model in, if that was given to `enable`."""
        self.on = True
        self.warned_between = False
        self._named_policy = policy
        self._warned_few = False
        self._explicit: ContextVar[Request | None] = ContextVar("adacache_request", default=None)
        self._run: ContextVar[PipelineRun | None] = ContextVar("adacache_run", default=None)
        self._pass: ContextVar[Pass | None] = ContextVar("adacache_pass", default=None)
        self._context: ContextVar[str | None] = ContextVar("adacache_context", default=None)
        self._implicit: Request | None = None
        self._last_timestep = float("inf")
        self._latest: Request | None = None
        if num_steps is not None:
            self.policy: Policy = self.policy_for(num_steps)
        elif isinstance(policy, str | Path):
            preset(policy, None)

    def policy_for(self, num_steps: int) -> Policy:
        """The settings for so many steps.

        Raises:
            ValueError: they do not fit the model or the schedule.
        """
        named = self._named_policy
        policy = preset(named, num_steps) if isinstance(named, str | Path) else named
        policy.check(num_steps, self.stack)
        if num_steps <= FEW_STEPS and not self._warned_few:
            self._warned_few = True
            warnings.warn(
                f"AdaCache: of {num_steps} steps, the first two and the last two are always computed, so "
                "that little is to be gained; few-step models are better run without it",
                stacklevel=4,
            )
        return policy

    @property
    def sites(self) -> list[str]:
        """Names of the places at which residuals are formed, in the order they run."""
        return self.adapter.sites(self.model)

    @property
    def known(self) -> bool:
        """Whether an adapter knows the model's class; if not, its block lists were found by structure."""
        return not isinstance(self.adapter, GenericAdapter)

    @property
    def current(self) -> Request | None:
        """The request that `with handle.request()` has open here, if any."""
        return self._explicit.get()

    @property
    def passing(self) -> Pass | None:
        """The forward call that is under way here, if any."""
        return self._pass.get()

    @property
    def trace(self) -> Trace:
        """The trace of the latest request.

        Raises:
            RuntimeError: nothing has run yet.
        """
        if self._latest is None:
            raise RuntimeError("trace: no generation call has run since AdaCache was enabled")
        return self._latest.trace

    @contextlib.contextmanager
    def request(
        self, *, num_videos: int = 1, video_of_row: Sequence[int] | None = None, branches: int = 1
    ) -> Iterator[Request]:
        """One generation call of a hand-written loop; every forward call inside belongs to it.

        Inside, steps are known by counting calls, so that nothing is read from the device.

        Args:
            num_videos: videos in the batch.
            video_of_row: video of each row; None: row b belongs to video b % num_videos.
            branches: forward calls a step: 2 with guidance in two calls (those inside diffusers'
                `cache_context` are known by its name).
        """
        if self.num_steps is None:
            raise ValueError("num_steps: give it to adacache.enable for a loop of your own")
        request = Request(
            self.policy,
            self.stack,
            num_steps=self.num_steps,
            num_videos=num_videos,
            video_of_row=None if video_of_row is None else [int(video) for video in video_of_row],
            branches=branches,
        )
        token = self._explicit.set(request)
        self._latest = request
        try:
            yield request
        finally:
            self._explicit.reset(token)
            request.close()

    @contextlib.contextmanager
    def during(self, run: PipelineRun) -> Iterator[None]:
        """Has calls inside belong to one call of a pipeline."""
        token = self._run.set(run)
        try:
            yield
        finally:
            self._run.reset(token)

    @contextlib.contextmanager
    def passing_through(self, now: Pass) -> Iterator[None]:
        """Has the model's blocks know the forward call that is under way."""
        token = self._pass.set(now)
        try:
            yield
        finally:
            self._pass.reset(token)

    @contextlib.contextmanager
    def in_context(self, name: str, plain: contextlib.AbstractContextManager[Any]) -> Iterator[Any]:
        """Has calls inside belong to the guidance branch `name`; enters `plain` too."""
        token = self._context.set(name)
        try:
            with plain as value:
                yield value
        finally:
            self._context.reset(token)

    def reset(self) -> None:
        """Forgets the request of calls outside `request()`; the next call starts a new one."""
        if self._implicit is not None:
            self._implicit.close()
        self._implicit = None
        self._last_timestep = float("inf")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward with caching; takes and returns what the model's own does."""
        assert not isinstance(self.adapter, BlockAdapter)
        return self.adapter.forward(self.model, self, *args, **kwargs)

    @contextlib.contextmanager
    def call(self, x: Tensor, timestep: Tensor | float) -> Iterator[tuple[Request, Call]]:
        """One forward call: finds its request, advances it, and ends it if the call fails.

        Args:
            x: the model's input; its shape and device tell requests apart.
            timestep: of this call, of any shape.

        Raises:
            RuntimeError: gradients are being recorded, or more calls came than the schedule has steps.
        """
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.model.parameters()):
            raise RuntimeError("AdaCache is for inference only: call the model under torch.no_grad()")
        request, same_step, context = self.current, None, self._context.get()
        if request is None:
            run = self._run.get()
            if run is not None:
                request, same_step = self._request_of(run, x, context)
            else:
                request, same_step = self._implicit_request(x, timestep)
        call = request.begin_call(tuple(x.shape), x.device, timestep, same_step, context)
        try:
            yield request, call
        except BaseException as error:
            request.end(f"{type(error).__name__}: {error}")
            raise
        observe = getattr(request.schedule, "observe", None)
        if observe is not None:
            observe(call, request.caches)

    def _request_of(self, run: PipelineRun, x: Tensor, context: str | None) -> tuple[Request, bool]:
        """The request of a call inside a pipeline's, and whether it is a further guidance branch of the step
        before: known by the branch's name and by the scheduler's steps, without a look at the timestep."""
        request = run.requests.get(self)
        same_step = request is not None and run.seen.get(self) == run.step and request.step > 0
        if request is not None and context is not None:
            same_step = same_step and request.same_step(context)
        over = request is not None and not same_step and request.step >= request.num_steps
        if request is None or over or request.shape not in (None, tuple(x.shape)):
            # A pipeline may run its loop again, for the next part of a long video.
            num_steps = run.steps_left(self) if request is None else run.steps_again()
            if self.num_steps is not None and request is None and self.num_steps != num_steps:
                raise ValueError(
                    f"num_steps: AdaCache is enabled for {self.num_steps} steps, the pipeline runs "
                    f"{num_steps}"
                )
            if request is not None:
                request.close()
            request = Request(
                self.policy_for(num_steps),
                self.stack,
                num_steps=num_steps,
                num_videos=run.videos_of(x.shape[0], self.rows_per_video),
            )
            run.requests[self] = self._latest = request
            same_step = False
        run.seen[self] = run.step
        return request, same_step

    def _implicit_request(self, x: Tensor, timestep: Tensor | float) -> tuple[Request, bool]:
        """The request of a call outside `request()`, known by its timestep: a rise or a new shape opens a new
        one."""
        # The mean, since the first tokens' timestep is always 0 where an image is given.
        now = float(timestep.double().mean()) if isinstance(timestep, Tensor) else float(timestep)
        request = self._implicit
        goes_on = request is not None and request.ended_by is None and request.shape == tuple(x.shape)
        if request is None or not goes_on or now > self._last_timestep:
            if self.num_steps is None:
                raise ValueError(
                    "num_steps: AdaCache was enabled on the pipeline, and this call came from elsewhere; "
                    "give num_steps to adacache.enable for that"
                )
            if request is not None:
                request.close()
            rows = self.rows_per_video or (2 if x.shape[0] % 2 == 0 else 1)
            if x.shape[0] % rows:
                raise ValueError(
                    f"rows_per_video: expected a divisor of the {x.shape[0]} rows of x, got {rows}"
                )
            request = Request(
                self.policy, self.stack, num_steps=self.num_steps, num_videos=max(1, x.shape[0] // rows)
            )
            self._implicit = self._latest = request
            self._last_timestep = now
            return request, False
        same_step = now == self._last_timestep
        self._last_timestep = now
        return request, same_step

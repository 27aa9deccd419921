"""Switching AdaCache on and off for a model, and telling one generation call from the next."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from adacache.adapters import Adapter, adapter_for
from adacache.policies import Policy, StackInfo, preset
from adacache.request import Call, Request
from adacache.trace import Trace

_ATTRIBUTE = "_adacache_handle"


def enable(
    model: nn.Module, policy: Policy | str, *, num_steps: int, rows_per_video: int | None = None
) -> Handle:
    """Switches AdaCache on for a model; every generation call is then one request.

    Args:
        model: a model that an adapter knows, such as `adacache.models.stdit3.STDiT3`.
        policy: settings such as `AdaCache(...)`, or the name of a preset (`adacache.preset_names()`).
        num_steps: denoising steps that the sampler runs.
        rows_per_video: rows of the batch that belong to one video, for calls outside `handle.request()`: 2
            with guidance in one batch, 1 without; None: 2 if the batch is even.

    Returns:
        A handle with `trace`, `request()` and `sites`.

    Raises:
        ValueError: an unknown model or preset, settings that do not fit the model or the schedule, or a model
            on which AdaCache is enabled already.
    """
    if _ATTRIBUTE in model.__dict__:
        raise ValueError("model: AdaCache is enabled on it already; call adacache.disable(model) first")
    handle = Handle(model, adapter_for(model), policy, num_steps, rows_per_video)
    model.__dict__[_ATTRIBUTE] = handle
    model.__dict__["forward"] = handle.forward
    return handle


def disable(model: nn.Module) -> None:
    """Switches AdaCache off: the model is as it was, bit for bit. The handle's last trace stays readable.

    Raises:
        ValueError: AdaCache is not enabled on the model.
    """
    if _ATTRIBUTE not in model.__dict__:
        raise ValueError("model: AdaCache is not enabled on it")
    handle: Handle = model.__dict__.pop(_ATTRIBUTE)
    handle.reset()
    if handle.replaced_forward is None:
        del model.__dict__["forward"]
    else:
        model.__dict__["forward"] = handle.replaced_forward


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
        adapter: Adapter,
        policy: Policy | str,
        num_steps: int,
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
        self.policy: Policy = preset(policy, num_steps) if isinstance(policy, str) else policy
        self.stack: StackInfo = adapter.stack(model)
        self.policy.check(num_steps, self.stack)
        self._explicit: ContextVar[Request | None] = ContextVar("adacache_request", default=None)
        self._implicit: Request | None = None
        self._last_timestep = float("inf")
        self._latest: Request | None = None

    @property
    def sites(self) -> list[str]:
        """Names of the sub-layers at which residuals are formed, in the order they run."""
        return self.adapter.sites(self.model)

    @property
    def current(self) -> Request | None:
        """The request that `with handle.request()` has open here, if any."""
        return self._explicit.get()

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
            branches: forward calls a step: 2 with guidance in two calls.
        """
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

    def reset(self) -> None:
        """Forgets the request of calls outside `request()`; the next call starts a new one."""
        if self._implicit is not None:
            self._implicit.close()
        self._implicit = None
        self._last_timestep = float("inf")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward with caching; takes and returns what the model's own does."""
        return self.adapter.forward(self.model, self, *args, **kwargs)

    @contextlib.contextmanager
    def call(self, x: Tensor, timestep: Tensor) -> Iterator[tuple[Request, Call]]:
        """One forward call: finds its request, advances it, and ends it if the call fails.

        Args:
            x: the model's input; its shape and device tell requests apart.
            timestep: [B] of this call.

        Raises:
            RuntimeError: gradients are being recorded, or more calls came than the schedule has steps.
        """
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.model.parameters()):
            raise RuntimeError("AdaCache is for inference only: call the model under torch.no_grad()")
        request, same_step = self.current, None
        if request is None:
            request, same_step = self._implicit_request(x, timestep)
        call = request.begin_call(tuple(x.shape), x.device, timestep, same_step)
        try:
            yield request, call
        except BaseException as error:
            request.end(f"{type(error).__name__}: {error}")
            raise

    def _implicit_request(self, x: Tensor, timestep: Tensor) -> tuple[Request, bool]:
        """The request of a call outside `request()`, known by its timestep: a rise or a new shape opens a new
        one."""
        now = float(timestep.reshape(-1)[0])
        request = self._implicit
        goes_on = request is not None and request.ended_by is None and request.shape == tuple(x.shape)
        if request is None or not goes_on or now > self._last_timestep:
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

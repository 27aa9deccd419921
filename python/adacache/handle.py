# SPDX-License-Identifier: Apache-2.0
"""A handle: a model with caching enabled, its policy, its clock and its runner."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, Protocol
from weakref import WeakSet

import torch

from adacache.adapters.registry import spec_for
from adacache.adapters.spec import ModelSpec
from adacache.checks import whole
from adacache.fused import TIERS
from adacache.interpose import plain_class
from adacache.policies import Named, PlannedTimesteps, Policy
from adacache.policies.base import wraps_of
from adacache.runtime.clock import Clock, CountingClock, TimestepClock
from adacache.runtime.prediction import predicted
from adacache.runtime.ranks import Parallel, Ranks
from adacache.runtime.request import Facts, Request
from adacache.runtime.runner import Entry, Runner
from adacache.trace import Trace

FEW_STEPS = 8
"""With this many steps or fewer, caching saves little."""

_NOTHING: Mapping[Any, Any] = MappingProxyType({})
_CLOCKS: ContextVar[Mapping[Handle, Clock]] = ContextVar("adacache_clocks", default=_NOTHING)
_BRANCHES: ContextVar[Mapping[Handle, str]] = ContextVar("adacache_branches", default=_NOTHING)


class Splits(Protocol):
    """What splits the arguments of blocks over ranks, moved from their forward to before the blocks."""

    entries: dict[Any, Entry]

    def restore(self) -> None:
        """Moves it back."""


class Handle:
    """Caching at work on one model. Made by `adacache.enable`.

    Attributes:
        model: the model.
        num_steps: denoising steps; None: the pipeline states them.
        rows_per_video: rows of the batch per video, for calls outside `request()`; None: 2 if the batch
            is even.
        known: whether the model's class is declared; if not, its blocks were detected.
        wraps: what is wrapped, see `policies.base.wraps_of`.
        grid: the timesteps that a pipeline's scheduler keeps, if not all.
        users: enabled pipelines that use the model.
        ranks: the processes that run the model together, if there are several.
        check_model: raises if the model can no longer be run as it was when caching was enabled.
    """

    def __init__(
        self,
        model: Any,
        policy: Policy | Named,
        num_steps: int | None,
        rows_per_video: int | None,
        fused: bool | str = True,
        parallel: Sequence[Parallel] = (),
    ):
        if rows_per_video is not None:
            whole(1)(rows_per_video, "rows_per_video")
        self.model = model
        self.num_steps = num_steps
        self.rows_per_video = rows_per_video
        settings = policy.policy(num_steps) if isinstance(policy, Named) else policy
        self.wraps = wraps_of(settings)
        self.grid = settings if isinstance(settings, PlannedTimesteps) else None
        _check_class(settings, model)
        spec, self.known = spec_for(model, blocks=self.wraps == "blocks")
        self.ranks = Ranks(parallel) if parallel else None
        if spec.whole_sequence and self.wraps == "blocks" and self._splits_tokens:
            raise ValueError(
                f"parallel: {spec.model_class} finds its new tokens by their place in the sequence, which "
                "cannot be split"
            )
        self._runner = Runner(self, model, spec, self.wraps, tier_of(fused, spec))
        self.users = 0
        self._fused = fused
        self._named_policy = policy
        self._parallel = tuple(parallel)
        self._warned: set[str] = set()
        self._moved: Splits | None = None
        self.check_model: Callable[[], None] = lambda: None
        self._threads = threading.local()
        self._latest: Request | None = None
        self._requests: WeakSet[Request] = WeakSet()
        if num_steps is not None:
            self.policy: Policy = self.policy_for(num_steps)

    # For users.

    @property
    def sites(self) -> list[str]:
        """Names of the sites at which residuals are formed, in the order they run."""
        return self._runner.sites.names()

    @property
    def trace(self) -> Trace:
        """The trace of the latest request.

        Raises:
            RuntimeError: nothing has run yet.
        """
        if self._latest is None:
            raise RuntimeError("trace: no generation call has run since AdaCache was enabled")
        return self._latest.trace

    @property
    def enabled(self) -> bool:
        """Whether caching is still enabled on the model."""
        return self._runner.on

    @property
    def current(self) -> Request | None:
        """The request that `with handle.request()` has open in this context, if any."""
        clock = _CLOCKS.get().get(self)
        return clock.request if isinstance(clock, CountingClock) and not clock.request.closed else None

    @contextlib.contextmanager
    def request(
        self, *, num_videos: int = 1, video_of_row: Sequence[int] | None = None, branches: int = 1
    ) -> Iterator[Request]:
        """One generation of a loop of your own; all forward calls inside belong to it.

        Inside, steps are counted, so that nothing is read from the device.

        Args:
            num_videos: videos in the batch.
            video_of_row: video of each row; None: row b belongs to video b % num_videos.
            branches: forward calls per step: 2 with guidance in two calls. Calls inside diffusers'
                `cache_context` are known by its name.

        Raises:
            ValueError: an argument does not fit, or the number of steps is unknown.
        """
        if self.num_steps is None:
            raise ValueError("num_steps: pass it to adacache.enable to run a loop of your own")
        request = self.open_request(self.num_steps, num_videos, video_of_row, branches)
        with self.clocked(CountingClock(request)):
            try:
                yield request
            finally:
                request.close()

    @property
    def has_run(self) -> bool:
        """Whether there is a trace."""
        return self._latest is not None

    def refresh(self, num_steps: int) -> None:
        """Forgets the request of calls outside `request()` in this thread, and sets the number of steps of
        the following ones.

        Raises:
            ValueError: the policy does not fit the number of steps.
        """
        self.policy = self.policy_for(num_steps)
        self.num_steps = num_steps
        self.reset()

    def reset(self) -> None:
        """Forgets the request of calls outside `request()` in this thread; the next call begins one."""
        clock = getattr(self._threads, "clock", None)
        if clock is not None:
            clock.close()

    def memory(self) -> int:
        """Bytes that all requests under way keep now."""
        return sum(request.store.bytes_now for request in list(self._requests))

    def predict_memory(
        self,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        num_videos: int = 1,
        branches: int = 1,
        num_steps: int | None = None,
    ) -> int:
        """The most bytes that a generation will keep. Nothing is computed: a copy of the model without values
        runs a step.

        Args:
            args, kwargs: of one forward call, with tensors of the shapes and dtypes that it will have, on any
                device ("meta" needs no memory).
            num_videos, branches: see `request`.
            num_steps: of a pipeline; None: those of `enable`.

        Raises:
            ValueError: the number of steps is unknown, or tokens are split over ranks.
            RuntimeError: the model does not run without values.
        """
        if self._splits_tokens:
            raise ValueError("memory: not predicted where ranks split the tokens; each keeps its part")
        steps = self.num_steps if num_steps is None else num_steps
        if steps is None:
            raise ValueError("num_steps: pass it, because AdaCache was enabled without it")
        policy: Any = self.policy_for(steps)
        if wraps_of(policy) == "guided" and not self.users:
            policy = policy.outside_pipeline()
        store = predicted(
            self.model,
            self._runner.spec,
            policy,
            wraps_of(policy),
            [(args, kwargs or {})] * branches,
            num_steps=steps,
            num_videos=num_videos,
        )
        return store.bytes

    def describe(self) -> dict[str, Any]:
        """What was matched: the class, whether it is declared, its block lists, and how its blocks run now:
        "fused blocks" of a tier ("exact": bit-identical to the model's own; "close": norms are rounded
        once), and the blocks that are not fused by reason; or "wrapped blocks"."""
        spec = self._runner.spec
        return {
            "model": type(self.model).__name__,
            "known": self.known,
            "block_lists": [one.label for one in spec.lists],
            "blocks": len(self._runner.sites.blocks),
            "streams": list(spec.streams),
            "watched": self._runner.sites.default_part,
            "parallel": [] if self.ranks is None else [[one.split, one.size] for one in self.ranks.parallels],
            **self._runner.how_blocks_run(),
        }

    # For `enable`, pipelines and the runner.

    def install(
        self, wrapper: Any = None, move_splits: Callable[[Mapping[str, Any]], Splits] | None = None
    ) -> None:
        """Wraps the model.

        Args:
            move_splits: from the blocks by name, what splits their arguments over the ranks.
        """
        if move_splits is not None and self.wraps == "blocks" and self._runner.spec.program is None:
            places = self._runner.spec.places(self.model)
            self._moved = move_splits({f"{one.list.name}.{one.number}": one.module for one in places})
            self._runner.entries = self._moved.entries
        self._runner.install(wrapper)

    def uninstall(self) -> None:
        self._runner.uninstall()
        if self._moved is not None:
            self._moved.restore()
        self.reset()

    def has_settings(
        self,
        policy: Policy | Named,
        num_steps: int | None,
        rows_per_video: int | None,
        fused: bool | str = True,
        parallel: Sequence[Parallel] = (),
    ) -> bool:
        """Whether `enable` was called with these settings."""
        own = (self._named_policy, self.num_steps, self.rows_per_video, self._fused, self._parallel)
        return own == (policy, num_steps, rows_per_video, fused, tuple(parallel))

    def policy_for(self, num_steps: int) -> Policy:
        """The settings for a number of steps.

        Raises:
            ValueError: they do not fit the model or the schedule.
        """
        named = self._named_policy
        policy = named.policy(num_steps) if isinstance(named, Named) else named
        policy.check(self._runner.sites, num_steps)
        self._check_ranks(policy, num_steps)
        if num_steps <= FEW_STEPS and self.wraps == "blocks":
            self.warn(
                "few",
                f"of {num_steps} steps, the first two and the last two are always computed, so caching saves "
                "little; few-step models are better run without caching",
            )
        return policy

    def open_request(
        self,
        num_steps: int,
        num_videos: int,
        video_of_row: Sequence[int] | None = None,
        branches: int = 1,
        may_restart: bool = False,
        in_pipeline: bool = False,
    ) -> Request:
        """A new request, which becomes the one of `trace`; see `Request`.

        Args:
            in_pipeline: the step of a pipeline's scheduler is wrapped.
        """
        self.check_model()
        policy: Any = self.policy_for(num_steps)
        if wraps_of(policy) == "guided" and not in_pipeline:
            policy = policy.outside_pipeline()
        request = Request(
            policy,
            self._runner.sites,
            num_steps=num_steps,
            num_videos=num_videos,
            video_of_row=video_of_row,
            branches=branches,
            may_restart=may_restart,
            ranks=self.ranks,
        )
        self._latest = request
        self._requests.add(request)
        return request

    @property
    def _splits_tokens(self) -> bool:
        return self.ranks is not None and any(one not in ("rows", "none") for one in self.ranks.splits)

    def _check_ranks(self, policy: Policy, num_steps: int) -> None:
        """Raises ValueError if a policy needs tokens that other ranks have."""
        if not self._splits_tokens or wraps_of(policy) == "guided":
            return
        assert self.ranks is not None
        decider = policy.start(self._runner.sites, num_steps, 1, torch.device("cpu"))
        local_latents = any(one in ("frames", "positions") for one in self.ranks.splits)
        reasons = {
            "reads kept tensors": decider.reads_kept,
            "filters the latents": local_latents
            and any(watch.transform is not None for watch in decider.signals.values()),
        }
        for reason, found in reasons.items():
            if found:
                raise ValueError(
                    f"parallel: {type(policy).__name__} {reason}, of which each rank has only a part; run it "
                    "on one process"
                )

    @contextlib.contextmanager
    def clocked(self, clock: Clock) -> Iterator[None]:
        """Calls inside are found by a clock."""
        with _bound(_CLOCKS, self, clock):
            yield

    @contextlib.contextmanager
    def named(self, name: str) -> Iterator[None]:
        with _bound(_BRANCHES, self, name):
            yield

    def context(self) -> str | None:
        return _BRANCHES.get().get(self)

    def clock(self, facts: Facts) -> Clock | None:
        clock = _CLOCKS.get().get(self)
        if clock is not None and not (isinstance(clock, CountingClock) and clock.request.closed):
            return clock
        if self.num_steps is None:
            self.warn(
                "elsewhere",
                "it was enabled on a pipeline, and this call came from elsewhere, so it runs without "
                "caching; pass num_steps to adacache.enable to cache such calls",
            )
            return None
        implicit: TimestepClock | None = getattr(self._threads, "clock", None)
        if implicit is None:
            implicit = self._threads.clock = TimestepClock(self._open_implicit)
        return implicit

    def _open_implicit(self, batch: int) -> Request:
        rows = self.rows_per_video or (2 if batch % 2 == 0 else 1)
        if batch % rows:
            raise ValueError(f"rows_per_video: expected a divisor of the {batch} rows of x, got {rows}")
        assert self.num_steps is not None
        return self.open_request(self.num_steps, max(1, batch // rows), may_restart=True)

    @contextlib.contextmanager
    def generation(self, num_steps: int, num_videos: int) -> Iterator[None]:
        if _CLOCKS.get().get(self) is not None and self.current is not None:
            yield
            return
        if self.num_steps != num_steps:
            raise ValueError(
                f"num_steps: AdaCache is enabled for {self.num_steps} steps, the sampler runs {num_steps}"
            )
        with self.request(num_videos=num_videos):
            yield

    def check_call(self, policy: Any, facts: Facts) -> None:
        origin = getattr(policy, "origin", None)
        difference = None if origin is None else origin.of_shape(facts.shape)
        if difference is not None:
            self.warn("shape", f"the path was calibrated on {difference}; the quality is not known")

    def check_scheduler(self, policy: Any, scheduler: Any) -> None:
        """Warns if a path was calibrated with another scheduler. Reads its timesteps."""
        origin = getattr(policy, "origin", None)
        if origin is not None and self.grid is None:
            timesteps = [float(one) for one in getattr(scheduler, "timesteps", ())]
            difference = origin.of_scheduler(plain_class(scheduler).__name__, timesteps)
            if difference is not None:
                self.warn("scheduler", f"the path was calibrated with {difference}; the quality is not known")

    def warn(self, key: str, message: str) -> None:
        """Warns once."""
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(f"AdaCache: {message}", stacklevel=4)


def tier_of(fused: Any, spec: ModelSpec) -> str | None:
    """The tier of block programs that `fused` of `enable` means; None: blocks run their own forward.

    Raises:
        ValueError: it is another value, or the model cannot run so.
    """
    if not isinstance(fused, bool) and fused not in TIERS:
        raise ValueError(f"fused: expected True, False or one of {list(TIERS)}, got {fused!r}")
    if spec.program is not None and fused in (False, "close"):
        raise ValueError(f'fused: {spec.model_class} of this project runs on fused ops, as "exact" alone')
    if isinstance(fused, str) and spec.program is None and spec.block_program is None:
        raise ValueError(f"fused: {spec.model_class} has no fused program; expected True or False")
    if isinstance(fused, str):
        return fused
    return TIERS[0] if fused else None


def _check_class(policy: Any, model: Any) -> None:
    origin, found = getattr(policy, "origin", None), plain_class(model).__name__
    if origin is not None and origin.model not in (None, found):
        raise ValueError(f"policy: the path was calibrated on {origin.model}, got a model of {found}")


@contextlib.contextmanager
def _bound(variable: ContextVar[Mapping[Any, Any]], key: Any, value: Any) -> Iterator[None]:
    """Binds a key of a mapping in a ContextVar; the exit may run in another context than the entry."""
    before = variable.get().get(key)
    variable.set({**variable.get(), key: value})
    try:
        yield
    finally:
        now = dict(variable.get())
        if now.get(key) is value:
            del now[key]
            variable.set(now if before is None else {**now, key: before})

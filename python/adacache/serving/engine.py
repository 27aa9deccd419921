# SPDX-License-Identifier: Apache-2.0
"""Continuous batching with a cache: videos join and leave between steps, and each has its own step, schedule,
guidance scale, policy and decisions."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adacache.adapters.registry import spec_for
from adacache.api import ATTRIBUTE
from adacache.checks import whole
from adacache.integrations.context_parallel import declared, sharded_over
from adacache.policies import Named, PlannedTimesteps, Policy
from adacache.policies.base import Action, ComputeAlways, Decider, wraps_of
from adacache.runtime.clock import Clock
from adacache.runtime.prediction import predicted
from adacache.runtime.request import Branch, Facts, Request
from adacache.runtime.runner import PlainHost, Runner
from adacache.serving.batch import (
    BatchBranch,
    BatchRequest,
    Member,
    SlotClock,
    batch_order,
    compatible,
    leaner,
    refuse_unsupported,
)
from adacache.serving.denoiser import Denoiser
from adacache.serving.pool import SlotPool
from adacache.serving.store import places
from adacache.sites import MODEL, ModelSites
from adacache.trace import Trace


class NoCache:
    """The policy that computes every step."""

    per_video = False
    wraps = "model"

    def check(self, sites: ModelSites, num_steps: int) -> None:
        pass

    def start(self, sites: ModelSites, num_steps: int, num_videos: int, device: torch.device) -> Decider:
        return ComputeAlways()

    def describe(self) -> dict[str, Any]:
        return {"policy": "NoCache"}


class Video:
    """A video of an `Engine`.

    Attributes:
        job: that it was made from.
        state: its `Denoising`.
        request: its decider and its trace.
        rows: its rows of the pool.
        alone: it is not batched, because a call of several videos failed with it.
        error: why it ended before its last step, if it did.
        done: whether it has left the engine.
    """

    def __init__(self, job: Any, policy: Policy, state: Any, request: Request):
        self.job = job
        self.policy = policy
        self.state = state
        self.request = request
        self.rows: list[int] = []
        self.alone = False
        self.error: BaseException | None = None
        self.done = False
        self.result: Any = None
        self._outputs: list[Tensor] = []
        self.dtype = torch.float32
        """Of the model's output."""

    @property
    def step(self) -> int:
        """Steps that have begun."""
        return self.request.step

    @property
    def num_steps(self) -> int:
        return int(self.state.num_steps)

    @property
    def trace(self) -> Trace:
        """What was measured and decided so far."""
        return self.request.trace

    def plan_ahead(self) -> dict[int, bool]:
        """The further steps about which it is known now whether they are computed (True) or reused (False).
        A step that is planned to be reused is computed nevertheless if nothing is kept."""
        if self.step == 0:
            return {1: True}
        found: dict[int, bool] = {}
        for number in range(self.step + 1, self.num_steps + 1):
            known = self.request.decider.known(number)
            if known and known[0] is not None:
                found[number] = known[0]
        return found

    @property
    def reuses_next(self) -> bool:
        """Whether the next step is known to be reused."""
        if self.step == 0:
            return False
        known = self.request.decider.known(self.step + 1)
        return bool(known) and known[0] is False


class Engine:
    """Runs videos step by step in common batches, with a cache. Not thread-safe; see `Batcher`.

    All kept tensors are in one allocation. It is made for the first job, or for `largest`.

    Args:
        denoiser: the model with its sampler.
        policy: settings or the name of a preset, for videos that state none; None: no caching.
        slots: the most videos at once.
        policies: further policies that videos may state; rows are made large enough for all of them.
        largest: the job whose kept tensors are largest; None: the first job.
        max_cache_bytes: of the allocation; if it does not suffice, kept tensors have fewer bits, then there
            are fewer slots, with a warning.
        leaner: dtypes to try for that, in order; may have float8_e4m3fn.
        max_batch: the most videos in one call, those that joined first; None: all. Where batching saves
            nothing, as on most CPUs, 1 or 2 gives the shortest latency.
        pack: videos whose next step is known to be reused go first, so that more videos are in a call that
            computes.

    Raises:
        ValueError: an argument does not fit, or caching is enabled on the model.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        policy: Policy | str | Path | None,
        *,
        slots: int = 8,
        policies: Sequence[Policy | str | Path] = (),
        largest: Any = None,
        max_cache_bytes: int | None = None,
        leaner: Sequence[torch.dtype] = (torch.bfloat16,),
        max_batch: int | None = None,
        pack: bool = True,
    ):
        whole(1)(slots, "slots")
        for value, name in ((max_cache_bytes, "max_cache_bytes"), (max_batch, "max_batch")):
            if value is not None:
                whole(1)(value, name)
        for dtype in leaner:
            if dtype not in (torch.bfloat16, torch.float16, torch.float8_e4m3fn):
                raise ValueError(f"leaner: expected bfloat16, float16 or float8_e4m3fn, got {dtype}")
        self.denoiser = denoiser
        self.slots = slots
        self.videos: list[Video] = []
        self._policies = [policy, *policies]
        self._max_bytes = max_cache_bytes
        self._leaner = list(leaner)
        self._kept_dtype: torch.dtype | None = None
        self._max_batch = max_batch
        self._pack = pack
        self._pool: SlotPool | None = None
        self._needs: dict[Any, dict[Any, int]] = {}
        self._sized: dict[Any, dict[Any, int]] = {}
        model: Any = denoiser.model
        if ATTRIBUTE in model.__dict__:
            raise ValueError("model: AdaCache is enabled on it already; call adacache.disable(model) first")
        if declared(model) is not None or sharded_over(model) > 1:
            raise ValueError("model: it is split over processes, which an engine does not support")
        self._spec, _ = spec_for(model)
        self._host = _Host()
        self._runner = Runner(self._host, model, self._spec)
        self._device = next(model.parameters()).device
        self._runner.install()
        model.__dict__[ATTRIBUTE] = self
        self.users = 0
        try:
            if largest is not None:
                self._allocate(denoiser.start(largest))
        except BaseException:
            self.close()
            raise

    # For `adacache.enable` and `disable`.

    def uninstall(self) -> None:
        self._runner.uninstall()

    # For users.

    def close(self) -> None:
        """Ends all videos and restores the model."""
        for video in list(self.videos):
            self.leave(video)
        model: Any = self.denoiser.model
        if model.__dict__.get(ATTRIBUTE) is self:
            del model.__dict__[ATTRIBUTE]
            self.uninstall()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def cache_bytes(self) -> int:
        """Bytes of the allocation."""
        return 0 if self._pool is None else self._pool.bytes

    @property
    def has_room(self) -> bool:
        """Whether a further video can join."""
        return len(self.videos) < self.slots

    def prepare(self, job: Any, policy: Policy | str | Path | None = None) -> Video:
        """A video that can join.

        Args:
            policy: instead of the engine's.

        Raises:
            ValueError: the job or the policy does not fit.
        """
        state = self.denoiser.start(job)
        settings = self._settings(self._policies[0] if policy is None else policy, state.num_steps)
        decider = settings.start(self._runner.sites, state.num_steps, 1, torch.device("cpu"))
        refuse_unsupported(settings, decider)
        return Video(job, settings, state, self._request(settings, state))

    def join(self, job: Any, policy: Policy | str | Path | None = None) -> Video:
        """Begins a video.

        Raises:
            ValueError: the job or the policy does not fit.
            RuntimeError: all slots are taken.
        """
        video = self.prepare(job, policy)
        self.admit(video)
        return video

    def admit(self, video: Video) -> None:
        """Begins a prepared video.

        Raises:
            ValueError: its kept tensors do not fit into a slot.
            RuntimeError: all slots are taken, or the engine is closed.
        """
        self._check_on()
        if not self.has_room:
            raise RuntimeError(f"slots: all {self.slots} are taken")
        if self._pool is None:
            self._allocate(video.state)
            if not self.has_room:
                raise RuntimeError(f"slots: all {self.slots} are taken")
        self._reserve(video)
        assert self._pool is not None
        video.rows = self._pool.take(int(video.state.rows))
        self.videos.append(video)

    def leave(self, video: Video) -> None:
        """Ends a video at any step."""
        if video in self.videos:
            self.videos.remove(video)
            assert self._pool is not None
            self._pool.give_back(video.rows)
            video.rows = []
        video.done = True
        video.request.close()

    def step(self) -> list[Video]:
        """Takes one step of the videos whose turn it is; returns those that are done. A video whose step
        failed is done with its `error`; errors of one video do not affect others.

        Raises:
            RuntimeError: the engine is closed.
        """
        self._check_on()
        left: list[Video] = []
        groups: dict[Any, list[Video]] = {}
        for video in self._chosen():
            groups.setdefault((video.state.shape, video if video.alone else None), []).append(video)
        with torch.no_grad():
            for videos in groups.values():
                self._take_step(videos)
        for video in list(self.videos):
            if video.error is None and video.step == video.num_steps and not video._outputs:
                try:
                    video.result = self.denoiser.result(video.state)
                except Exception as error:
                    video.error = error
            elif video.error is None:
                continue
            self.leave(video)
            left.append(video)
        return left

    # Policies and memory.

    def _settings(self, policy: Policy | str | Path | None, num_steps: int) -> Policy:
        settings: Any = policy
        if policy is None:
            settings = NoCache()
        elif isinstance(policy, str | Path):
            settings = Named(policy, None, None).policy(num_steps)
        if isinstance(settings, PlannedTimesteps):
            raise ValueError(
                "policy: these are timesteps for a pipeline's scheduler; pass a job with fewer steps instead"
            )
        if wraps_of(settings) == "guided":
            settings = settings.outside_pipeline()
        settings.check(self._runner.sites, num_steps)
        return settings

    def _places(self, state: Any, policy: Policy, dtype: torch.dtype | None) -> dict[Any, int]:
        """The bytes per row that each kept tensor of a video takes."""
        decider = policy.start(self._runner.sites, state.num_steps, 1, torch.device("cpu"))
        kept, watched = tuple(decider.keeps.items()), tuple(decider.watches.items())
        if not kept and not watched:
            return {}
        key = state.shape, kept, watched, dtype
        if key not in self._sized:
            rows = batch_order([int(state.rows)])
            calls = [
                self.denoiser.inputs([(state, copy) for _, copy in rows], {state: 1}, branch)
                for branch in range(self.denoiser.branches)
            ]
            store = predicted(
                self.denoiser.model,
                self._spec,
                policy,
                wraps_of(policy),
                calls,
                num_steps=state.num_steps,
                change=lambda site, keep: leaner(site, keep, dtype),
            )
            self._sized[key] = places(store, int(state.rows))
        return self._sized[key]

    def _allocate(self, state: Any) -> None:
        policies = [self._settings(policy, state.num_steps) for policy in self._policies]
        rows, limit = int(state.rows), self._max_bytes
        row_bytes = 0
        for dtype in (None, *self._leaner):
            needed: dict[Any, int] = {}
            for policy in policies:
                needed |= self._places(state, policy, dtype)
            row_bytes, self._kept_dtype = sum(needed.values()), dtype
            if limit is None or self.slots * rows * row_bytes <= limit:
                break
        if limit is not None and row_bytes * rows > limit:
            raise ValueError(
                f"max_cache_bytes: one video keeps {row_bytes * rows} bytes, got a limit of {limit}"
            )
        slots = self.slots if limit is None or not row_bytes else min(self.slots, limit // (rows * row_bytes))
        changes = [] if self._kept_dtype is None else [f"residuals are kept in {self._kept_dtype}"]
        if slots < self.slots:
            changes.append(f"there are {slots} slots, not {self.slots}")
        if changes:
            warnings.warn(
                f"AdaCache: to stay within max_cache_bytes={limit}, {' and '.join(changes)}", stacklevel=4
            )
        self.slots = slots
        self._pool = SlotPool(slots * rows, row_bytes, self._device)

    def _reserve(self, video: Video) -> None:
        """Checks that the kept tensors of a video fit into the rows, beside those of videos of its shape."""
        assert self._pool is not None
        needed = self._needs.setdefault(video.state.shape, {})
        together = needed | self._places(video.state, video.policy, self._kept_dtype)
        size, available = sum(together.values()), self._pool.memory.shape[1]
        if size > available or int(video.state.rows) > self._pool.memory.shape[0] // self.slots:
            raise ValueError(
                f"job: its kept tensors need {size} bytes in each of {video.state.rows} rows, slots have "
                f"{available} bytes in each of {self._pool.memory.shape[0] // self.slots}; pass largest= and "
                "policies= to Engine"
            )
        self._needs[video.state.shape] = together

    # One step.

    def _request(self, policy: Policy, state: Any) -> Request:
        return Request(
            policy,
            self._runner.sites,
            num_steps=int(state.num_steps),
            num_videos=1,
            branches=self.denoiser.branches,
        )

    def _check_on(self) -> None:
        if not self._runner.on:
            raise RuntimeError("engine: it was closed, or AdaCache was disabled on its model")

    def _restart(self, video: Video) -> None:
        """Begins a video anew, alone: a call with several videos failed, and the error may be another's."""
        assert self._pool is not None
        video.alone = True
        video._outputs = []
        video.request.close()
        self._pool.give_back(video.rows)
        video.rows = self._pool.take(len(video.rows))
        try:
            video.state = self.denoiser.start(video.job)
        except Exception as error:
            video.error = error
        video.request = self._request(video.policy, video.state)

    def _chosen(self) -> list[Video]:
        """The videos that take a step."""
        reusing = [video for video in self.videos if video.reuses_next] if self._pack else []
        return list(reusing or self.videos)[: self._max_batch]

    def _take_step(self, videos: list[Video]) -> None:
        for branch in range(self.denoiser.branches):
            members = {video: self._member(video, branch) for video in videos}
            videos = [video for video in videos if video.error is None]
            kept = [v for v in videos if members[v].model_keep and members[v].model_action != Action.COMPUTE]
            for calls, run in (
                (_grouped(kept, members), self._reuse_outputs),
                (_grouped([v for v in videos if v not in kept], members), self._call),
            ):
                for call in calls:
                    try:
                        run(call, [members[video] for video in call], branch)
                    except Exception as error:
                        videos = [video for video in videos if video not in call]
                        self._fail(call, error)
        for video in videos:
            try:
                self.denoiser.advance(video.state, video.step, video._outputs)
                video._outputs = []
            except Exception as error:
                video.error = error

    def _fail(self, videos: list[Video], error: Exception) -> None:
        if len(videos) == 1:
            videos[0].error = error
            return
        for video in videos:
            self._restart(video)

    def _member(self, video: Video, branch: int) -> Member:
        state = video.state
        number = video.step + 1 if branch == 0 else video.step
        shape = (int(state.rows), *state.latents.shape[1:])
        facts = Facts(shape, self._device, state.timestep(number))
        found = Branch(branch)
        try:
            found = video.request.begin_call(facts, branch == 0, branch)
        except Exception as error:
            video.error = error
        return Member(video.request, found, video.rows, self._kept_dtype)

    def _batch(self, videos: list[Video], members: list[Member]) -> BatchRequest:
        assert self._pool is not None
        layout = self._pool.layout(videos[0].state.shape)
        return BatchRequest(members, self._runner.sites, self._pool, layout, self._device)

    def _call(self, videos: list[Video], members: list[Member], branch: int) -> None:
        """One forward call of the model."""
        batch = self._batch(videos, members)
        rows = [(videos[video], copy) for video, copy in batch.order]
        args, kwargs = self.denoiser.inputs(
            [(video.state, copy) for video, copy in rows],
            {video.state: video.step for video in videos},
            branch,
        )
        with self._host.calling(batch, branch):
            output = self.denoiser.output(self.denoiser.model(*args, **kwargs))
        if output.shape[0] != len(rows):
            raise RuntimeError(f"model: expected an output of {len(rows)} rows, got {list(output.shape)}")
        if batch.store.dropped:
            for member in members:
                member.branch.forget()
        keeping = [member for member in members if member.model_keep is not None]
        if keeping:
            call = BatchBranch.of(batch, branch, Facts(tuple(output.shape), self._device), None)
            keep = batch.keep_of(MODEL)
            batch.store.keep((branch, MODEL, 0), output, keep, None, batch.gaps(call, MODEL), output)
            for member in keeping:
                member.request.note_kept(member.branch, MODEL, [Action.COMPUTE], [])
                member.request.note_computed([True])
        self._distribute(videos, batch, output)

    def _reuse_outputs(self, videos: list[Video], members: list[Member], branch: int) -> None:
        """The model's output at a step at which it does not run: the kept one, or its forecast."""
        batch = self._batch(videos, members)
        weights = batch.weights(MODEL, [member.model_action for member in members])
        rows = torch.stack([weights[video] for video, _ in batch.order])
        output = batch.store.outputs((branch, MODEL, 0), rows, videos[0].dtype)
        self._distribute(videos, batch, output)

    @staticmethod
    def _distribute(videos: list[Video], batch: BatchRequest, output: Tensor) -> None:
        for number, video in enumerate(videos):
            rows = [row for row, (own, _) in enumerate(batch.order) if own == number]
            video.dtype = output.dtype
            video._outputs.append(torch.stack([output[row] for row in rows]))


def _grouped(videos: Sequence[Video], members: dict[Video, Member]) -> list[list[Video]]:
    """Videos that can be in one call together."""
    groups: list[list[Video]] = []
    for video in videos:
        own = members[video]
        fitting = (group for group in groups if compatible([members[one] for one in group], own))
        group = next(fitting, None)
        if group is None:
            groups.append([video])
        else:
            group.append(video)
    return groups


class _Host(PlainHost):
    """The runner's host: the engine's calls have its clock, others run without caching."""

    def __init__(self) -> None:
        self._clock = SlotClock()
        self._thread: int | None = None

    @contextmanager
    def calling(self, batch: BatchRequest, index: int) -> Iterator[None]:
        self._clock.batch, self._clock.index = batch, index
        self._thread = threading.get_ident()
        try:
            yield
        finally:
            self._clock.batch = self._thread = None

    def clock(self, facts: Facts) -> Clock | None:
        return self._clock if self._thread == threading.get_ident() else None

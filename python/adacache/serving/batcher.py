# SPDX-License-Identifier: Apache-2.0
"""A thread-safe queue before an engine: bounded and fair, with priorities, deadlines and cancellation."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adacache.checks import number, whole
from adacache.policies import Policy
from adacache.serving.engine import Engine, Video
from adacache.trace import Trace


class QueueFull(RuntimeError):
    """No further job can wait."""


class DeadlineExceeded(TimeoutError):
    """A job was not finished by its deadline."""


@dataclass(eq=False)
class Ticket:
    """A job of a `Batcher`.

    Attributes:
        client, priority: see `Batcher.submit`.
        deadline: by the batcher's clock; None: there is none.
        future: of the result.
        submitted, began, ended: by the batcher's clock.
    """

    video: Video
    client: str
    priority: int
    deadline: float | None
    number: int
    submitted: float
    began: float | None = None
    ended: float | None = None
    future: Future[Any] = field(default_factory=Future)
    cancelled: bool = False
    _wake: Callable[[Ticket], None] = lambda ticket: None

    def __post_init__(self) -> None:
        self.future.set_running_or_notify_cancel()  # only the batcher ends it

    def result(self, timeout: float | None = None) -> Any:
        """Waits for the result.

        Raises:
            CancelledError, DeadlineExceeded: it ended before its last step.
            TimeoutError: it is not done within `timeout` seconds.
        """
        return self.future.result(timeout)

    @property
    def done(self) -> bool:
        return self.future.done()

    @property
    def step(self) -> int:
        """Steps that have begun; 0 while it waits."""
        return self.video.step

    @property
    def num_steps(self) -> int:
        return self.video.num_steps

    @property
    def trace(self) -> Trace:
        """What was measured and decided so far.

        Raises:
            RuntimeError: it has not begun.
        """
        if self.began is None:
            raise RuntimeError("trace: the job has not begun")
        return self.video.trace

    def cancel(self) -> bool:
        """Ends the job: at once if it waits, else after the step under way. False: it is done already."""
        if self.done:
            return False
        self.cancelled = True
        self._wake(self)
        return True


@dataclass(frozen=True)
class Counts:
    """What a batcher has done: jobs by their state, and steps of the engine."""

    waiting: int
    running: int
    finished: int
    failed: int
    cancelled: int
    expired: int
    steps: int


class Batcher:
    """Queues jobs for an engine, which it owns from then on.

    Jobs are admitted by priority, then in turn per client, then in the order in which they came. A job that
    runs is not interrupted by one of higher priority. One thread runs the steps: that of `start`, or any that
    calls `run_step`.

    Args:
        engine: see `Engine`.
        max_waiting: the most jobs that wait.
        clock: seconds, for deadlines.
    """

    def __init__(self, engine: Engine, *, max_waiting: int = 64, clock: Callable[[], float] = time.monotonic):
        whole(1)(max_waiting, "max_waiting")
        self.engine = engine
        self._most = max_waiting
        self._clock = clock
        self._changed = threading.Condition()
        """Guards all below."""
        self._waiting: list[Ticket] = []
        self._running: list[Ticket] = []
        self._room: list[Future[None]] = []
        self._last_turn: dict[str, int] = {}
        self._numbers = itertools.count()
        self._counts = dict.fromkeys(("finished", "failed", "cancelled", "expired", "steps"), 0)
        self._closed = False
        self._stepping = threading.Lock()
        """Guards the engine. Taken before `_changed` where both are needed."""
        self._thread: threading.Thread | None = None

    # Clients.

    def submit(
        self,
        job: Any,
        policy: Policy | str | Path | None = None,
        *,
        client: str = "",
        priority: int = 0,
        deadline: float | None = None,
        block: bool = False,
        timeout: float | None = None,
    ) -> Ticket:
        """Queues a job.

        Args:
            job: of the engine's denoiser.
            policy: instead of the engine's.
            client: jobs of several clients are admitted in turn.
            priority: jobs of higher priority are admitted first.
            deadline: seconds from now after which the job is dropped.
            block, timeout: whether, and how many seconds, to wait for room in the queue.

        Raises:
            QueueFull: too many jobs wait.
            ValueError: the job or the policy does not fit.
            RuntimeError: the batcher is closed.
        """
        whole()(priority, "priority")
        if deadline is not None:
            number(above=0)(deadline, "deadline")
        video = self.engine.prepare(job, policy)
        now = self._clock()
        with self._changed:
            if block:
                self._changed.wait_for(lambda: self._closed or self._has_room, timeout)
            if self._closed:
                raise RuntimeError("batcher: it is closed")
            if not self._has_room:
                raise QueueFull(f"max_waiting: {self._most} jobs wait already; submit again later")
            ends = None if deadline is None else now + deadline
            ticket = Ticket(video, client, priority, ends, next(self._numbers), now)
            ticket._wake = self._cancel_waiting
            self._waiting.append(ticket)
            self._changed.notify_all()
        return ticket

    def plan_ahead(self) -> dict[Ticket, dict[int, bool]]:
        """Per job that runs, its further steps about which it is known now whether they are computed (True)
        or reused (False). Waits for the step under way."""
        with self._stepping:
            with self._changed:
                running = list(self._running)
            return {ticket: ticket.video.plan_ahead() for ticket in running}

    @property
    def counts(self) -> Counts:
        with self._changed:
            return Counts(len(self._waiting), len(self._running), **self._counts)

    def room(self) -> Future[None]:
        """Done once a job can be queued; another may take the place before."""
        future: Future[None] = Future()
        with self._changed:
            if self._has_room or self._closed:
                future.set_result(None)
            else:
                self._room.append(future)
        return future

    # The loop.

    def run_step(self) -> bool:
        """Admits jobs and takes a step of the engine. False: there was nothing to do."""
        with self._stepping:
            self._drop_running()
            self._drop_waiting()
            self._admit()
            with self._changed:
                running = {ticket.video: ticket for ticket in self._running}
                self._counts["steps"] += bool(running)
            if not running:
                return False
            try:
                done = self.engine.step()
            except BaseException as error:
                for ticket in running.values():
                    self._end(ticket, "failed", error)
                if not isinstance(error, Exception):
                    raise
                return True
            for video in done:
                if video.error is not None:
                    self._end(running[video], "failed", video.error)
                else:
                    self._end(running[video], "finished", None)
        return True

    def start(self) -> Batcher:
        """Runs steps in a thread until `close`."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="adacache-batcher", daemon=True)
            self._thread.start()
        return self

    def close(self, *, drain: bool = False) -> None:
        """Ends all jobs and closes the engine.

        Args:
            drain: runs those that were queued first; without `start`, in this thread.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if drain and self._thread is not None:
            self._thread.join()  # it ends when nothing is left
        while drain and self.run_step():
            pass
        with self._changed:
            left = [*self._waiting, *self._running]
            for ticket in left:
                ticket.cancelled = True
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        with self._stepping:
            for ticket in left:
                if not ticket.done:
                    self._end(ticket, "cancelled", CancelledError("batcher: closed before the job was done"))
            self.engine.close()
        self._notify_room()

    def __enter__(self) -> Batcher:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.close(drain=error[0] is None)

    def _run(self) -> None:
        while True:
            worked = self.run_step()
            with self._changed:
                if self._closed and not self._waiting and not self._running:
                    return
                if not worked and not self._waiting:
                    self._changed.wait()

    @property
    def _has_room(self) -> bool:
        return len(self._waiting) < self._most

    def _admit(self) -> None:
        while self.engine.has_room:
            ticket = self._next()
            if ticket is None:
                return
            try:
                self.engine.admit(ticket.video)
            except Exception as error:
                self._end(ticket, "failed", error)
                continue
            with self._changed:
                ticket.began = self._clock()
                self._running.append(ticket)

    def _next(self) -> Ticket | None:
        """The next job to admit, out of the queue."""
        with self._changed:
            if not self._waiting:
                return None
            ticket = min(
                self._waiting,
                key=lambda one: (-one.priority, self._last_turn.get(one.client, -1), one.number),
            )
            self._waiting.remove(ticket)
            self._last_turn[ticket.client] = next(self._numbers)
            if not any(one.client in self._last_turn for one in self._waiting):
                self._last_turn = {ticket.client: self._last_turn[ticket.client]}
            self._changed.notify_all()
        self._notify_room()
        return ticket

    def _notify_room(self) -> None:
        with self._changed:
            waiting, self._room = self._room, []
        for future in waiting:
            if future.set_running_or_notify_cancel():
                future.set_result(None)

    def _cancel_waiting(self, ticket: Ticket) -> None:
        with self._changed:
            waits = ticket in self._waiting
            if waits:
                self._waiting.remove(ticket)
            self._changed.notify_all()
        if waits:
            self._end(ticket, "cancelled", CancelledError("job: cancelled before it began"))
            self._notify_room()

    def _expired(self, ticket: Ticket) -> bool:
        return ticket.deadline is not None and self._clock() >= ticket.deadline

    def _drop_waiting(self) -> None:
        with self._changed:
            late = [ticket for ticket in self._waiting if self._expired(ticket) or ticket.cancelled]
            self._waiting = [ticket for ticket in self._waiting if ticket not in late]
            self._changed.notify_all()
        for ticket in late:
            if ticket.cancelled:
                self._end(ticket, "cancelled", CancelledError("batcher: closed before the job was done"))
            else:
                self._end(ticket, "expired", DeadlineExceeded("deadline: it passed before the job began"))
        if late:
            self._notify_room()

    def _drop_running(self) -> None:
        with self._changed:
            running = list(self._running)
        for ticket in running:
            place = f"after step {ticket.step} of {ticket.num_steps}"
            if ticket.cancelled:
                self._end(ticket, "cancelled", CancelledError(f"job: cancelled {place}"))
            elif self._expired(ticket):
                self._end(ticket, "expired", DeadlineExceeded(f"deadline: it passed {place}"))

    def _end(self, ticket: Ticket, how: str, error: BaseException | None) -> None:
        """Ends a job that is out of the queue."""
        if ticket.began is not None and not ticket.video.done:
            self.engine.leave(ticket.video)
        with self._changed:
            if ticket in self._running:
                self._running.remove(ticket)
            if ticket in self._waiting:
                self._waiting.remove(ticket)
            ticket.ended = self._clock()
            self._counts[how] += 1
            self._changed.notify_all()
        if error is None:
            ticket.future.set_result(ticket.video.result)
        else:
            ticket.future.set_exception(error)


class AsyncBatcher:
    """A `Batcher` for asyncio. A coroutine that is cancelled cancels its job.

    Args:
        batcher: is started, and closed at the end of `async with`.
    """

    def __init__(self, batcher: Batcher):
        self.batcher = batcher

    async def __aenter__(self) -> AsyncBatcher:
        self.batcher.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await asyncio.to_thread(self.batcher.close, drain=error[0] is None)

    async def submit(
        self, job: Any, policy: Policy | str | Path | None = None, *, wait: bool = True, **settings: Any
    ) -> Ticket:
        """`Batcher.submit`.

        Args:
            wait: while the queue is full; False: raises `QueueFull`.
        """
        while True:
            try:
                return self.batcher.submit(job, policy, **settings)
            except QueueFull:
                if not wait:
                    raise
                await asyncio.wrap_future(self.batcher.room())

    async def generate(self, job: Any, policy: Policy | str | Path | None = None, **settings: Any) -> Any:
        """The result of a job; see `submit` for the settings."""
        ticket = await self.submit(job, policy, **settings)
        try:
            return await asyncio.wrap_future(ticket.future)
        except asyncio.CancelledError:
            if ticket.cancelled:
                raise CancelledError("job: cancelled") from None
            ticket.cancel()
            raise

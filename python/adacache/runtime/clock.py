# SPDX-License-Identifier: Apache-2.0
"""Which request, step and branch a forward call belongs to. A step is the clock's, whatever shape a call
has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from adacache.policies.base import Sums
from adacache.runtime.meter import Meter
from adacache.runtime.request import Branch, Facts, Request
from adacache.sites import Site


@dataclass(frozen=True)
class Tick:
    """Where a forward call belongs."""

    request: Request
    branch: Branch


class Clock(Protocol):
    """Finds the request, the step and the branch of each forward call."""

    def tick(self, facts: Facts) -> Tick:
        """Begins a call."""

    def tock(self, tick: Tick) -> None:
        """Ends a call that succeeded."""


class Calls:
    """The calls of one step so far; names its branches."""

    def __init__(self) -> None:
        self.seen: Counter[Hashable] = Counter()
        self.count = 0

    def add(self, name: Hashable) -> Hashable:
        """The key of a call's branch: its name, and how many calls of the step had the same name before
        it."""
        key = name, self.seen[name]
        self.seen[name] += 1
        self.count += 1
        return key


class CountingClock:
    """Counts the calls of an explicit request; reads nothing from the device.

    A step has `branches` calls. Calls inside a `cache_context` are known by its name: a name that comes
    again, once the step has all its calls, begins the next step.
    """

    def __init__(self, request: Request):
        self.request = request
        self._calls = Calls()

    def tick(self, facts: Facts) -> Tick:
        full = self._calls.count >= self.request.branches_per_step
        new_step = self.request.step == 0 or full
        if facts.context is not None and full:
            new_step = facts.context in self._calls.seen
        calls = Calls() if new_step else self._calls
        branch = self.request.begin_call(facts, new_step, calls.add(facts.context))
        self._calls = calls
        return Tick(self.request, branch)

    def tock(self, tick: Tick) -> None:
        pass


class TimestepClock:
    """Recognizes steps by the timestep, for calls outside `request()`; reads it once per call.

    Equal timesteps are further branches of one step. A timestep that moves on begins a step, one that moves
    back begins a generation.

    Args:
        open_request: makes a request for a batch of so many rows.
    """

    def __init__(self, open_request: Callable[[int], Request]):
        self._open = open_request
        self._request: Request | None = None
        self._calls = Calls()
        self._calls_before = 0
        self._timestep = 0.0
        self._shape: tuple[int, ...] = ()
        self._direction = 0.0
        """Sign of the change of the timestep from step to step; 0 before the second step."""

    def tick(self, facts: Facts) -> Tick:
        now = facts.read_timestep()
        assert now is not None
        request, change = self._request, now - self._timestep
        # A changed number of rows is guidance switched on or off; another size is another generation.
        goes_on = (
            request is not None
            and not request.closed
            and request.ended_by is None
            and request.fits(facts.shape[0])
            and (change == 0 or facts.shape[1:] == self._shape[1:])
        )
        if request is None or not goes_on or change * self._direction < 0:
            request = self._restart(facts)
            new_step = True
        else:
            new_step = change != 0
            if new_step and request.step == 1:
                self._direction = 1.0 if change > 0 else -1.0
            if new_step and request.step == 2 and self._calls.count < self._calls_before:
                # The first step had more calls than the second: those before the last were a warm-up, or a
                # generation that was abandoned after its first step.
                self._drop_warm_up(request)
        if new_step:
            self._calls_before = self._calls.count
        calls = Calls() if new_step else self._calls
        branch = request.begin_call(facts, new_step, calls.add(facts.context))
        self._calls, self._timestep, self._shape = calls, now, facts.shape
        return Tick(request, branch)

    def _drop_warm_up(self, request: Request) -> None:
        meter, store = Meter(request, request.lead, request.lead.frames), request.store

        def measure(site: Site, old: Tensor) -> Sums:
            latest = store.watched(site)
            assert latest is not None
            return meter.sums(site, latest, old)

        request.restart(self._calls.count, measure)

    def adopt(self, request: Request, facts: Facts, calls: Calls) -> None:
        """Goes on with a request whose first step ran under another clock."""
        self._request, self._calls, self._shape = request, calls, facts.shape
        self._timestep = facts.read_timestep() or 0.0

    def _restart(self, facts: Facts) -> Request:
        self.close()
        self._request = self._open(facts.shape[0])
        self._calls, self._direction = Calls(), 0.0
        return self._request

    def tock(self, tick: Tick) -> None:
        request = tick.request
        if request.step >= request.num_steps and self._calls.count >= self._calls_before:
            request.free()  # nothing is reused after the last call of the last step

    def close(self) -> None:
        """Forgets the request; the next call begins one."""
        if self._request is not None:
            self._request.close()
        self._request = None

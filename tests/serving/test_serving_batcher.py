# SPDX-License-Identifier: Apache-2.0
"""The queue in front of the serving engine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from typing import Any

import adacache
import pytest
import torch
from adacache.models.rectified_flow import RectifiedFlow
from adacache.serving import AsyncBatcher, Batcher, DeadlineExceeded, Engine, FlowDenoiser, QueueFull
from serving_cases import ADACACHE, REPLAY, Wanted, batch_error


@pytest.fixture(autouse=True)
def restored(tiny_digit_model: Any) -> Iterator[None]:
    """The model is plain after each test, also after one that fails."""
    yield
    if "_adacache_handle" in tiny_digit_model.__dict__:
        adacache.disable(tiny_digit_model)


class Time:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def batcher(model: Any, slots: int = 1, max_batch: int | None = None, **settings: Any) -> Batcher:
    engine = Engine(FlowDenoiser(model, RectifiedFlow(5)), REPLAY, slots=slots, max_batch=max_batch)
    return Batcher(engine, **settings)


def job(model: Any, seed: int = 0, steps: int = 6) -> Any:
    return Wanted(seed, steps).job(model)


def order(server: Batcher, tickets: dict[str, Any]) -> list[str]:
    """Names in the order in which they began."""
    began: list[str] = []
    while server.run_step():
        began += [name for name, one in tickets.items() if one.began is not None and name not in began]
    return began


def test_results_equal_single_runs(tiny_digit_model: Any) -> None:
    """From several threads."""
    wanted = [Wanted(seed, 6, 2.0 + seed % 2, REPLAY if seed % 3 else ADACACHE) for seed in range(6)]
    results: dict[int, torch.Tensor] = {}
    engine = Engine(
        FlowDenoiser(tiny_digit_model, RectifiedFlow(6)),
        ADACACHE,
        slots=3,
        policies=[REPLAY],
        largest=wanted[0].job(tiny_digit_model),
    )
    jobs = [one.job(tiny_digit_model) for one in wanted]

    def client(own: list[int]) -> None:
        for number in own:
            results[number] = server.submit(jobs[number], wanted[number].policy, client=str(own)).result(200)

    with Batcher(engine) as server:
        threads = [threading.Thread(target=client, args=(own,)) for own in ([0, 1, 2], [3, 4], [5])]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert server.counts.finished == 6
    tolerance = 4 * batch_error(tiny_digit_model, wanted)
    for number, one in enumerate(wanted):
        assert float((results[number] - one.alone(tiny_digit_model)[0]).abs().max()) <= tolerance


def test_the_queue_is_bounded(tiny_digit_model: Any) -> None:
    server = batcher(tiny_digit_model, max_waiting=2)
    first = [server.submit(job(tiny_digit_model)) for _ in range(2)]
    with pytest.raises(QueueFull, match="max_waiting: 2 jobs wait already"):
        server.submit(job(tiny_digit_model))
    with pytest.raises(QueueFull):
        server.submit(job(tiny_digit_model), block=True, timeout=0.01)
    room = server.room()
    assert not room.done()
    server.run_step()
    assert room.done()
    assert server.counts.running == 1
    third = server.submit(job(tiny_digit_model), block=True, timeout=0.01)
    while server.run_step():
        pass
    assert [one.done for one in (*first, third)] == [True] * 3
    assert server.counts.finished == 3
    server.close()


def test_clients_take_turns(tiny_digit_model: Any) -> None:
    server = batcher(tiny_digit_model)
    tickets = {
        f"{client}{i}": server.submit(job(tiny_digit_model), client=client)
        for client, count in (("a", 3), ("b", 2))
        for i in range(count)
    }
    assert order(server, tickets) == ["a0", "b0", "a1", "b1", "a2"]
    server.close()


def test_priorities_come_first(tiny_digit_model: Any) -> None:
    server = batcher(tiny_digit_model)
    tickets = {
        str(priority): server.submit(job(tiny_digit_model), priority=priority) for priority in (0, 2, -1, 1)
    }
    assert order(server, tickets) == ["2", "1", "0", "-1"]
    server.close()


def test_cancelling(tiny_digit_model: Any) -> None:
    server = batcher(tiny_digit_model)
    running, waiting, last = (server.submit(job(tiny_digit_model, seed)) for seed in range(3))
    server.run_step()
    server.run_step()
    assert waiting.cancel()
    with pytest.raises(CancelledError, match="before it began"):
        waiting.result(0)
    assert running.cancel()
    assert not running.done
    server.run_step()
    with pytest.raises(CancelledError, match="cancelled after step 2 of 6"):
        running.result(0)
    assert running.trace.computed_steps == [1, 2]
    with pytest.raises(RuntimeError, match="trace: the job has not begun"):
        _ = waiting.trace
    while server.run_step():
        pass
    assert not last.cancel()
    assert server.counts.cancelled == 2
    server.close()
    assert torch.equal(last.result(0), Wanted(2, 6, policy=REPLAY).alone(tiny_digit_model)[0])


def test_deadlines(tiny_digit_model: Any) -> None:
    time = Time()
    server = batcher(tiny_digit_model, clock=time)
    running = server.submit(job(tiny_digit_model), deadline=5)
    late = server.submit(job(tiny_digit_model), deadline=3)
    fine = server.submit(job(tiny_digit_model), deadline=50)
    server.run_step()
    time.now = 4
    server.run_step()
    assert late.done
    time.now = 5
    server.run_step()
    with pytest.raises(DeadlineExceeded, match="passed after step 2 of 6"):
        running.result(0)
    with pytest.raises(DeadlineExceeded, match="before the job began"):
        late.result(0)
    while server.run_step():
        pass
    assert fine.result(0).isfinite().all()
    assert server.counts.expired == 2
    assert (fine.submitted, fine.began, fine.ended) == (0, 5, 5)
    server.close()


def test_steps_are_planned_ahead(tiny_digit_model: Any) -> None:
    server = batcher(tiny_digit_model, slots=2)
    ticket = server.submit(job(tiny_digit_model))
    assert server.plan_ahead() == {}
    server.run_step()
    assert server.plan_ahead() == {ticket: {2: True, 3: False, 4: True, 5: False, 6: True}}
    server.close()


def test_errors(tiny_digit_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = batcher(tiny_digit_model, slots=2, max_batch=1)
    wrong = job(tiny_digit_model)
    wrong.z = wrong.z[0]
    with pytest.raises(ValueError, match="z: expected"):
        server.submit(wrong)
    with pytest.raises(ValueError, match="priority: expected a whole number"):
        server.submit(job(tiny_digit_model), priority=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="deadline: expected a number above 0"):
        server.submit(job(tiny_digit_model), deadline=0)
    first = server.submit(job(tiny_digit_model))
    larger = job(tiny_digit_model, 1)
    larger.z = larger.z.repeat(1, 1, 2, 1, 1)
    second = server.submit(larger)
    third = server.submit(job(tiny_digit_model, 2))
    while server.run_step():
        pass
    with pytest.raises(ValueError, match="job: its kept tensors need"):
        second.result(0)
    assert (server.counts.finished, server.counts.failed) == (2, 1)
    # An error of the engine itself ends what runs, and the next job is served.
    broken = server.submit(job(tiny_digit_model))
    with monkeypatch.context() as patch:
        patch.setattr(server.engine, "_chosen", lambda: 1 / 0)
        server.run_step()
    with pytest.raises(ZeroDivisionError):
        broken.result(0)
    healthy = server.submit(job(tiny_digit_model))
    while server.run_step():
        pass
    server.close()
    for ticket, seed in ((first, 0), (third, 2), (healthy, 0)):
        assert torch.equal(ticket.result(0), Wanted(seed, 6, policy=REPLAY).alone(tiny_digit_model)[0])


def test_closing(tiny_digit_model: Any) -> None:
    server = batcher(tiny_digit_model).start()
    tickets = [server.submit(job(tiny_digit_model)) for _ in range(3)]
    server.close(drain=True)
    assert all(ticket.result(0).isfinite().all() for ticket in tickets)
    with pytest.raises(RuntimeError, match="it is closed"):
        server.submit(job(tiny_digit_model))
    server = batcher(tiny_digit_model)
    tickets = [server.submit(job(tiny_digit_model)) for _ in range(3)]
    server.run_step()
    server.close()
    for ticket in tickets:
        with pytest.raises(CancelledError, match="closed before"):
            ticket.result(0)
    assert "_adacache_handle" not in tiny_digit_model.__dict__


def test_asyncio(tiny_digit_model: Any) -> None:
    async def run() -> list[Any]:
        async with AsyncBatcher(batcher(tiny_digit_model, max_waiting=1)) as server:
            abandoned = asyncio.create_task(server.generate(job(tiny_digit_model, 9, 6)))
            await asyncio.sleep(0)
            others = [asyncio.create_task(server.generate(job(tiny_digit_model, seed))) for seed in range(3)]
            await asyncio.sleep(0)
            abandoned.cancel()
            found = await asyncio.gather(*others)
            with pytest.raises(asyncio.CancelledError):
                await abandoned
            return found

    found = asyncio.run(asyncio.wait_for(run(), 200))
    for seed, video in enumerate(found):
        assert torch.equal(video, Wanted(seed, 6, policy=REPLAY).alone(tiny_digit_model)[0])


def test_asyncio_without_waiting(tiny_digit_model: Any) -> None:
    async def run() -> None:
        server = AsyncBatcher(batcher(tiny_digit_model, max_waiting=1))
        await server.submit(job(tiny_digit_model), wait=False)
        for refused in (server.submit, server.generate):
            with pytest.raises(QueueFull):
                await refused(job(tiny_digit_model), wait=False)
        await asyncio.to_thread(server.batcher.close)

    asyncio.run(asyncio.wait_for(run(), 200))

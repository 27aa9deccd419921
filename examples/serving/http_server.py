# SPDX-License-Identifier: Apache-2.0
"""An HTTP server of the digit model: continuous batching with a cache behind FastAPI.

python examples/serving/http_server.py --port 8000 --policy digits/fast --slots 4
"""

from __future__ import annotations

import argparse
import asyncio
import io
import itertools
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import CancelledError
from contextlib import asynccontextmanager
from dataclasses import asdict
from statistics import fmean, median, quantiles
from typing import Any, Literal

import numpy
import torch
import uvicorn
from adacache.commands.comparison import frames
from adacache.commands.options import device, whole_number
from adacache.commands.report import gif
from adacache.digits import FPS, SIZE, encode, load, noise, sampler, with_null
from adacache.models.stdit3 import STDiT3
from adacache.policies import Policy
from adacache.serving import (
    AsyncBatcher,
    Batcher,
    DeadlineExceeded,
    Engine,
    FlowDenoiser,
    FlowJob,
    QueueFull,
    Ticket,
)
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, Field
from torch import Tensor

STEPS = 30
CLIENT_CLOSED_REQUEST = 499
"""The status that nginx logs for it; nobody receives it."""
Format = Literal["npz", "gif"]


class Order(BaseModel):  # type: ignore[misc, unused-ignore]
    """The body of a request for a video."""

    prompt: str
    seed: int = Field(0, ge=0, lt=2**63)
    num_steps: int = Field(STEPS, ge=1, le=200)
    guidance_scale: float | None = Field(None, ge=0, le=100)
    client: str = Field("", max_length=100)
    priority: int = Field(0, ge=-100, le=100)
    deadline: float | None = Field(None, gt=0, le=86400)


class Service:
    """The routes of the server and what they share.

    Args:
        batcher: of the digit model; is started and closed by the application.
        most_kept: finished videos that can still be fetched; the oldest are dropped.
    """

    def __init__(self, batcher: Batcher, most_kept: int = 256):
        self._server = AsyncBatcher(batcher)
        self._batcher = batcher
        self._model: Any = batcher.engine.denoiser.model
        self._device = next(self._model.parameters()).device
        self._most_kept = most_kept
        self._numbers = itertools.count(1)
        self._tickets: dict[str, Ticket] = {}
        self._rejected = 0
        self._disconnected = 0
        self._latencies: deque[float] = deque(maxlen=1000)
        self._seconds_running: deque[float] = deque(maxlen=20)
        self._steps = {"computed": 0, "reused": 0}

    def application(self) -> FastAPI:
        app = FastAPI(title="AdaCache digits", lifespan=self._lifespan)
        app.add_api_route("/videos", self.submit, methods=["POST"], status_code=202)
        app.add_api_route("/videos/{name}", self.status, methods=["GET"])
        app.add_api_route("/videos/{name}", self.cancel, methods=["DELETE"])
        app.add_api_route("/videos/{name}/clip", self.clip, methods=["GET"])
        app.add_api_route("/generate", self.generate, methods=["POST"])
        app.add_api_route("/stats", self.stats, methods=["GET"])
        app.add_api_route("/metrics", self.metrics, methods=["GET"])
        return app

    # Routes.

    async def submit(self, order: Order) -> dict[str, Any]:
        """Queues a video; returns its state with its id."""
        name, ticket = await self._submit(order)
        return self._state(name, ticket)

    async def status(self, name: str) -> dict[str, Any]:
        """The state of a video, and its progress in steps."""
        return self._state(name, self._found(name))

    async def cancel(self, name: str) -> dict[str, Any]:
        """Ends a video: at once if it waits, else after the step under way."""
        ticket = self._found(name)
        ticket.cancel()
        return self._state(name, ticket)

    async def clip(self, name: str, format: Format = "npz") -> Response:
        """The result of a finished video."""
        ticket = self._found(name)
        if not ticket.done:
            raise HTTPException(
                409, f"video {name}: {_phase(ticket)}, step {ticket.step} of {ticket.num_steps}"
            )
        return await _response(ticket, format)

    async def generate(self, order: Order, request: Request, format: Format = "npz") -> Response:
        """Generates a video in one request. A client that disconnects cancels it."""
        _, ticket = await self._submit(order)
        ended = asyncio.ensure_future(_ended(ticket))
        gone = asyncio.ensure_future(_disconnect(request))
        try:
            await asyncio.wait({ended, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (ended, gone):
                task.cancel()
            if ticket.cancel():
                self._disconnected += 1
        if not ticket.done:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        return await _response(ticket, format)

    async def stats(self) -> dict[str, Any]:
        """Counts since the start, and latencies in seconds of the latest 1000 finished videos."""
        known = list(self._latencies)
        tail = quantiles(known, n=20, method="inclusive")[-1] if len(known) > 1 else max(known, default=0.0)
        return {
            **asdict(self._batcher.counts),
            "rejected": self._rejected,
            "disconnected": self._disconnected,
            "latency_p50": median(known) if known else 0.0,
            "latency_p95": tail,
            "computed_steps": self._steps["computed"],
            "reused_steps": self._steps["reused"],
            "slots": self._batcher.engine.slots,
            "cache_bytes": self._batcher.engine.cache_bytes,
        }

    async def metrics(self) -> PlainTextResponse:
        """The numbers of `stats` in the text format of Prometheus."""
        lines = [f"adacache_{name} {value:g}" for name, value in (await self.stats()).items()]
        return PlainTextResponse("\n".join([*lines, ""]))

    # Their parts.

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        async with self._server:  # at the end, videos that were accepted are generated
            yield

    async def _submit(self, order: Order) -> tuple[str, Ticket]:
        try:
            ticket = await self._server.submit(
                self._job(order),
                wait=False,
                client=order.client,
                priority=order.priority,
                deadline=order.deadline,
            )
        except QueueFull as error:
            self._rejected += 1
            raise HTTPException(429, str(error), {"Retry-After": str(self._retry_after())}) from error
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        except RuntimeError as error:
            raise HTTPException(503, str(error)) from error
        name = str(next(self._numbers))
        self._tickets[name] = ticket
        ticket.future.add_done_callback(lambda _: self._note(ticket))
        self._drop_old()
        return name, ticket

    def _job(self, order: Order) -> FlowJob:
        captions = with_null(self._model, encode([order.prompt]).to(self._device))
        return FlowJob(
            noise([order.seed]).to(self._device),
            captions,
            order.guidance_scale,
            order.num_steps,
            fps=FPS,
            height=SIZE,
            width=SIZE,
        )

    def _retry_after(self) -> int:
        """Seconds until a place in the queue becomes free: a slot's share of the time that a video runs."""
        known = list(self._seconds_running)
        return max(1, math.ceil(fmean(known) / self._batcher.engine.slots)) if known else 1

    def _note(self, ticket: Ticket) -> None:
        """In the thread of the batcher, when a video ends."""
        if ticket.future.exception() is not None or ticket.began is None or ticket.ended is None:
            return
        self._latencies.append(ticket.ended - ticket.submitted)
        self._seconds_running.append(ticket.ended - ticket.began)
        computed = len(ticket.trace.computed_steps)
        self._steps["computed"] += computed
        self._steps["reused"] += ticket.num_steps - computed

    def _drop_old(self) -> None:
        done = [name for name, ticket in self._tickets.items() if ticket.done]
        for name in done[: max(0, len(done) - self._most_kept)]:
            del self._tickets[name]

    def _found(self, name: str) -> Ticket:
        ticket = self._tickets.get(name)
        if ticket is None:
            raise HTTPException(404, f"video {name}: unknown, or dropped after {self._most_kept} others")
        return ticket

    def _state(self, name: str, ticket: Ticket) -> dict[str, Any]:
        state = {
            "id": name,
            "state": _phase(ticket),
            "step": ticket.step,
            "num_steps": ticket.num_steps,
            "seconds": (time.monotonic() if ticket.ended is None else ticket.ended) - ticket.submitted,
        }
        if ticket.began is not None:
            state["computed_steps"] = ticket.trace.computed_steps
        return state


def _phase(ticket: Ticket) -> str:
    if not ticket.done:
        return "waiting" if ticket.began is None else "running"
    error = ticket.future.exception()
    if error is None:
        return "finished"
    if isinstance(error, DeadlineExceeded):
        return "expired"
    return "cancelled" if isinstance(error, CancelledError) else "failed"


async def _ended(ticket: Ticket) -> None:
    await asyncio.wait([asyncio.wrap_future(ticket.future)])


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _response(ticket: Ticket, format: Format) -> Response:
    """The clip of a video that has ended.

    Raises:
        HTTPException: it has none.
    """
    error = ticket.future.exception()
    if error is not None:
        code = {"expired": 504, "cancelled": 410}.get(_phase(ticket), 500)
        raise HTTPException(code, f"{type(error).__name__}: {error}")
    data = await asyncio.to_thread(_encoded, ticket.result(), format)
    media = {"npz": "application/octet-stream", "gif": "image/gif"}[format]
    steps = ",".join(map(str, ticket.trace.computed_steps))
    return Response(data, media_type=media, headers={"X-Computed-Steps": steps})


def _encoded(result: Tensor, format: Format) -> bytes:
    """An animated GIF, or an archive of NumPy with `clip`: [T, H, W] float32 in 0 .. 1."""
    clip = frames(result)
    assert clip is not None
    if format == "gif":
        return gif([clip.cpu()])
    buffer = io.BytesIO()
    numpy.savez_compressed(buffer, clip=clip.cpu().numpy())
    return buffer.getvalue()


def digits_batcher(
    model: STDiT3,
    policy: Policy | str | None,
    *,
    slots: int = 4,
    max_waiting: int = 64,
    max_batch: int | None = None,
    max_cache_bytes: int | None = None,
) -> Batcher:
    """A queue before an engine of the digit model."""
    engine = Engine(
        FlowDenoiser(model, sampler(STEPS)),
        policy,
        slots=slots,
        max_batch=max_batch,
        max_cache_bytes=max_cache_bytes,
    )
    return Batcher(engine, max_waiting=max_waiting)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=whole_number(1, 65535), default=8000)
    parser.add_argument("--policy", default="digits/fast", help="a preset; none: no caching")
    parser.add_argument("--slots", type=whole_number(1), default=4, help="videos at once")
    parser.add_argument("--max-waiting", type=whole_number(1), default=64, help="videos in the queue")
    parser.add_argument("--max-batch", type=whole_number(1), help="videos per forward call")
    parser.add_argument("--max-cache-bytes", type=whole_number(1), help="of the cache")
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    batcher = digits_batcher(
        load().requires_grad_(False).to(options.device),
        None if options.policy == "none" else options.policy,
        slots=options.slots,
        max_waiting=options.max_waiting,
        max_batch=options.max_batch,
        max_cache_bytes=options.max_cache_bytes,
    )
    uvicorn.run(Service(batcher).application(), host=options.host, port=options.port)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""The HTTP example: results, states, a full queue, deadlines, cancellation, disconnected clients, load."""

from __future__ import annotations

import contextlib
import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import adacache
import numpy
import pytest
import torch
from adacache.digits import FPS, SIZE, encode, noise, sampler, with_null
from adacache.digits.captions import all_prompts
from serving_cases import ADACACHE
from tiny_digits import network

pytest.importorskip("fastapi", reason="fastapi is not installed")
httpx = pytest.importorskip("httpx", reason="httpx is not installed")
uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed")
pytest.importorskip("PIL", reason="pillow is not installed")

import http_load  # noqa: E402
import http_server  # noqa: E402
from fastapi.testclient import TestClient  # noqa: E402

STEPS = 6
SECONDS = 60


def order(seed: int = 0, **settings: Any) -> dict[str, Any]:
    return {"prompt": str(all_prompts()[seed]), "seed": seed, "num_steps": STEPS, **settings}


class Gate:
    """Blocks the engine before each step while it is closed."""

    def __init__(self, engine: Any):
        self.opened = threading.Event()
        self.opened.set()
        plain = engine.step

        def step() -> Any:
            assert self.opened.wait(SECONDS)
            return plain()

        engine.step = step


@pytest.fixture
def service(tiny_digit_model: Any) -> Iterator[Any]:
    """With one slot, one place in the queue and the two latest results."""
    batcher = http_server.digits_batcher(tiny_digit_model, ADACACHE, slots=1, max_waiting=1)
    found = http_server.Service(batcher, most_kept=2)
    found.gate = Gate(batcher.engine)
    yield found
    found.gate.opened.set()
    batcher.close()
    if "_adacache_handle" in tiny_digit_model.__dict__:
        adacache.disable(tiny_digit_model)


@pytest.fixture
def client(service: Any) -> Iterator[TestClient]:
    with TestClient(service.application()) as found:
        yield found
        service.gate.opened.set()


def wait_until(condition: Callable[[], Any]) -> Any:
    ends = time.monotonic() + SECONDS
    while time.monotonic() < ends:
        found = condition()
        if found:
            return found
        time.sleep(0.005)
    raise AssertionError("timed out")


def state(client: Any, name: str) -> str:
    return str(client.get(f"/videos/{name}").json()["state"])


def clip_of(answer: Any) -> torch.Tensor:
    assert answer.status_code == 200, answer.text
    return torch.from_numpy(numpy.load(io.BytesIO(answer.content))["clip"])


def expected_clip(seed: int) -> tuple[torch.Tensor, list[int]]:
    """The clip of a plain call of the sampler, and its computed steps."""
    model = network()
    y = with_null(model, encode([all_prompts()[seed]]))
    with pytest.warns(UserWarning, match="few-step models"):
        handle = adacache.enable(model, ADACACHE, num_steps=STEPS)
    video = sampler(STEPS).sample(model, noise([seed]), y, fps=FPS, height=SIZE, width=SIZE)
    return (video[0, 0].clamp(-1, 1) + 1) / 2, handle.trace.computed_steps


def test_a_video_is_that_of_a_single_run(client: TestClient) -> None:
    made = client.post("/videos", json=order(3))
    assert made.status_code == 202
    name = made.json()["id"]
    wait_until(lambda: state(client, name) == "finished")
    found = client.get(f"/videos/{name}").json()
    answer = client.get(f"/videos/{name}/clip")
    image = client.get(f"/videos/{name}/clip?format=gif")
    direct = client.post("/generate", json=order(3))
    stats = client.get("/stats").json()
    metrics = client.get("/metrics").text
    clip, steps = expected_clip(3)
    assert torch.allclose(clip_of(answer), clip, atol=1e-6)
    assert torch.equal(clip_of(direct), clip_of(answer))
    assert (found["step"], found["num_steps"], found["computed_steps"]) == (STEPS, STEPS, steps)
    assert image.content.startswith(b"GIF8")
    assert image.headers["X-Computed-Steps"] == ",".join(map(str, steps))
    assert (stats["finished"], stats["slots"]) == (2, 1)
    assert stats["computed_steps"] == 2 * len(steps)
    assert stats["reused_steps"] == 2 * (STEPS - len(steps))
    assert stats["latency_p95"] >= stats["latency_p50"] > 0
    assert "adacache_finished 2\n" in metrics


def test_a_full_queue_deadlines_and_cancellation(client: TestClient, service: Any) -> None:
    service.gate.opened.clear()
    running = client.post("/videos", json=order()).json()["id"]
    wait_until(lambda: state(client, running) == "running")
    waiting = client.post("/videos", json=order(1, deadline=0.01)).json()["id"]
    assert state(client, waiting) == "waiting"
    for path in ("/videos", "/generate"):
        refused = client.post(path, json=order(2))
        assert refused.status_code == 429
        assert int(refused.headers["Retry-After"]) >= 1
        assert "max_waiting: 1 jobs wait already" in refused.json()["detail"]
    assert client.get(f"/videos/{running}/clip").status_code == 409
    assert client.delete(f"/videos/{running}").status_code == 200
    service.gate.opened.set()
    wait_until(lambda: state(client, running) == "cancelled")
    wait_until(lambda: state(client, waiting) == "expired")
    assert client.get(f"/videos/{running}/clip").status_code == 410
    late = client.get(f"/videos/{waiting}/clip")
    assert (late.status_code, late.json()["detail"][:17]) == (504, "DeadlineExceeded:")
    stats = client.get("/stats").json()
    assert (stats["rejected"], stats["cancelled"], stats["expired"], stats["finished"]) == (2, 1, 1, 0)


def test_wrong_requests(client: TestClient, service: Any) -> None:
    for wrong in (order() | {"prompt": "a cat"}, order(num_steps=0), order(deadline=-1), {}):
        assert client.post("/videos", json=wrong).status_code == 422
    assert "word 2 of 'a cat'" in client.post("/generate", json={"prompt": "a cat"}).json()["detail"]
    assert client.get("/videos/7").status_code == 404
    names = []
    for seed in range(4):
        names.append(client.post("/videos", json=order(seed)).json()["id"])
        wait_until(lambda: state(client, names[-1]) == "finished")
    assert [client.get(f"/videos/{name}").status_code for name in names] == [404, 200, 200, 200]
    service._batcher.close()
    assert client.post("/videos", json=order()).status_code == 503


def test_an_error_of_the_model(client: TestClient, service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service._batcher.engine, "_chosen", lambda: 1 / 0)
    failed = client.post("/generate", json=order())
    assert (failed.status_code, failed.json()["detail"]) == (500, "ZeroDivisionError: division by zero")


@contextmanager
def running(service: Any) -> Iterator[str]:
    """The address of a real server on a free port."""
    config = uvicorn.Config(service.application(), port=0, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        service.gate.opened.set()
        server.should_exit = True
        thread.join(SECONDS)
        assert not thread.is_alive()


def test_a_client_that_disconnects_cancels_its_video(service: Any) -> None:
    with running(service) as url, httpx.Client(base_url=url, timeout=SECONDS) as client:
        service.gate.opened.clear()
        first = threading.Thread(target=abandoned, args=(url,))
        first.start()
        wait_until(lambda: client.get("/stats").json()["running"] == 1)
        abandoned(url)  # waits in the queue
        first.join(SECONDS)
        wait_until(lambda: client.get("/stats").json()["disconnected"] == 2)
        service.gate.opened.set()
        wait_until(lambda: client.get("/stats").json()["cancelled"] == 2)
        assert client.post("/generate", json=order()).status_code == 200


def abandoned(url: str) -> None:
    with contextlib.suppress(httpx.ReadTimeout):
        httpx.post(f"{url}/generate", json=order(), timeout=0.5)


def test_load(service: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with running(service) as url:
        settings = ["--url", url, "--videos", "6", "--num-steps", str(STEPS)]
        found = http_load.main([*settings, "--rate", "1000"])
    assert found.statuses.total() == 6
    assert set(found.statuses) <= {200, 429}
    assert len(found.latencies) == found.statuses[200] >= 2
    printed = capsys.readouterr().out
    assert printed.startswith(f"videos:     6 ({found.statuses[200]} x 200")
    assert "videos/s" in printed
    assert "p95" in printed
    with running_nowhere() as url:
        assert http_load.main(["--url", url, "--videos", "1"]).statuses == {0: 1}


@contextmanager
def running_nowhere() -> Iterator[str]:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but does not listen
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"

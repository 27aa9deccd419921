# SPDX-License-Identifier: Apache-2.0
"""Loads the HTTP server with videos that arrive at random (a Poisson process); prints throughput and latency.

python examples/serving/http_load.py --rate 2 --videos 60
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

import httpx
from adacache.commands.options import real_number, whole_number
from adacache.digits.captions import held_out_prompts


@dataclass
class Load:
    """What a run measured.

    Attributes:
        seconds: from the first arrival to the last answer.
        statuses: number of answers per HTTP status; 0: none came.
        latencies: seconds of each video with status 200.
    """

    seconds: float = 0.0
    statuses: Counter[int] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)

    def report(self) -> str:
        done = self.latencies
        tail = quantiles(done, n=20, method="inclusive")[-1] if len(done) > 1 else max(done, default=0.0)
        counts = ", ".join(f"{count} x {status}" for status, count in sorted(self.statuses.items()))
        return (
            f"videos:     {sum(self.statuses.values())} ({counts})\n"
            f"throughput: {len(done) / self.seconds:.2f} videos/s in {self.seconds:.1f} s\n"
            f"latency:    p50 {median(done) if done else 0:.2f} s, p95 {tail:.2f} s"
        )


async def load(
    url: str, *, rate: float, videos: int, num_steps: int, deadline: float | None, seed: int = 0
) -> Load:
    """Sends requests and waits for all answers.

    Args:
        rate: mean arrivals per second.
        deadline: seconds per video; None: none.
    """
    source, found, prompts = random.Random(seed), Load(), held_out_prompts()

    async def one(number: int) -> None:
        order: dict[str, Any] = {"prompt": str(prompts[number % len(prompts)]), "seed": number}
        order |= {"num_steps": num_steps, "deadline": deadline, "client": str(number % 4)}
        begin = time.perf_counter()
        try:
            status = (await client.post("/generate", json=order)).status_code
        except httpx.TransportError:
            status = 0
        found.statuses[status] += 1
        if status == 200:
            found.latencies.append(time.perf_counter() - begin)

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as client:
        begin = time.perf_counter()
        tasks = []
        for number in range(videos):
            tasks.append(asyncio.create_task(one(number)))
            await asyncio.sleep(source.expovariate(rate))
        await asyncio.gather(*tasks)
        found.seconds = time.perf_counter() - begin
    return found


def main(arguments: Sequence[str] | None = None) -> Load:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--rate", type=real_number(above=0), default=1.0, help="mean arrivals per second")
    parser.add_argument("--videos", type=whole_number(1), default=30)
    parser.add_argument("--num-steps", type=whole_number(1), default=30)
    parser.add_argument("--deadline", type=real_number(above=0), help="seconds per video")
    parser.add_argument("--seed", type=whole_number(0), default=0, help="of the arrivals")
    options = parser.parse_args(arguments)
    found = asyncio.run(
        load(
            options.url,
            rate=options.rate,
            videos=options.videos,
            num_steps=options.num_steps,
            deadline=options.deadline,
            seed=options.seed,
        )
    )
    print(found.report())
    return found


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Serving the digit model: throughput and latency of videos that arrive at random.

    python benchmarks/serving.py --json build/bench/serving.json --plot build/bench/serving.png

Videos of all motion classes and backgrounds arrive as a Poisson process. Five servers get the same arrivals:

- slots, AdaCache: `adacache.serving.Engine`; videos join and leave between steps, each decides for itself
- slots, one per call: the same with `max_batch=1`; the video that joined first takes its steps first
- one by one, AdaCache: one video after the other, first come, first served
- slots, no cache: the same engine, every step computed
- one decision, AdaCache: all that wait, up to the number of slots, run as one batch with one decision

A server's clock is the CPU time of its thread. Other processes on the machine still change it by 10 % and
more, through shared caches, so all servers are repeated in turn.
A load of 1 is the throughput of one by one; "all" is the throughput if all videos are there from the start.
"""

from __future__ import annotations

import argparse
import math
import platform
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any

import adacache
import torch
from adacache.commands.options import whole_number
from adacache.commands.table import print_table
from adacache.digits import FPS, SIZE, encode, load, noise, sampler, with_null
from adacache.digits.captions import Prompt, held_out_prompts
from adacache.files import write_json
from adacache.models.stdit3 import STDiT3
from adacache.plots import COLORS
from adacache.policies.presets import preset
from adacache.serving import Engine, FlowDenoiser, FlowJob
from torch import Tensor

SLOTS, ONE_PER_CALL, ONE_BY_ONE, NO_CACHE, ONE_DECISION = (
    "slots, AdaCache",
    "slots, one per call, AdaCache",
    "one by one, AdaCache",
    "slots, no cache",
    "one decision, AdaCache",
)


@dataclass(frozen=True)
class Setting:
    """What is served.

    Attributes:
        model, policy: the digit model and its cache.
        prompts: of the videos.
        steps, slots: denoising steps, and the most videos at once.
    """

    model: STDiT3
    policy: Any
    prompts: Sequence[Prompt]
    steps: int
    slots: int

    def job(self, video: int) -> FlowJob:
        y = with_null(self.model, encode([self.prompts[video]]))
        return FlowJob(noise([video]), y, num_steps=self.steps, fps=FPS, height=SIZE, width=SIZE)

    def sample(self, videos: Sequence[int]) -> Tensor:
        y = with_null(self.model, encode([self.prompts[video] for video in videos]))
        flow = sampler(self.steps)
        return flow.sample(self.model, noise(list(videos)), y, fps=FPS, height=SIZE, width=SIZE)


@dataclass
class Served:
    """What one server did.

    Attributes:
        ended: per video, when it was done.
        computed: per video, its computed steps.
        results: per video, if they are kept.
    """

    ended: dict[int, float]
    computed: dict[int, int]
    results: dict[int, Tensor]


Server = Callable[[Sequence[float]], Served]
"""Serves videos that arrive at these times."""


def by_engine(setting: Setting, policy: Any, max_batch: int | None = None) -> Server:
    """A server with slots."""

    def serve(arrivals: Sequence[float]) -> Served:
        served, now, running = Served({}, {}, {}), 0.0, {}
        waiting = list(range(len(arrivals)))
        denoiser = FlowDenoiser(setting.model, sampler(setting.steps))
        settings = {"slots": setting.slots, "largest": setting.job(0), "max_batch": max_batch}
        with Engine(denoiser, policy, **settings) as engine:
            while waiting or running:
                if not running:
                    now = max(now, arrivals[waiting[0]])
                begin = time.thread_time()
                while waiting and engine.has_room and arrivals[waiting[0]] <= now:
                    video = waiting.pop(0)
                    running[engine.join(setting.job(video))] = video
                done = engine.step()
                now += time.thread_time() - begin
                for one in done:
                    if one.error is not None:
                        raise one.error
                    video = running.pop(one)
                    served.ended[video] = now
                    served.computed[video] = len(one.trace.computed_steps)
                    served.results[video] = one.result
        return served

    return serve


def one_by_one(setting: Setting) -> tuple[Served, list[float]]:
    """Each video alone, and the seconds that it took."""
    served, seconds, now = Served({}, {}, {}), [], 0.0
    handle = adacache.enable(setting.model, setting.policy, num_steps=setting.steps)
    try:
        for video in range(len(setting.prompts)):
            begin = time.thread_time()
            served.results[video] = setting.sample([video])
            seconds.append(time.thread_time() - begin)
            now += seconds[-1]
            served.ended[video] = now
            served.computed[video] = len(handle.trace.computed_steps)
    finally:
        adacache.disable(setting.model)
    return served, seconds


def in_turn(alone: Served, seconds: Sequence[float]) -> Server:
    """One by one, from the measured seconds of each video."""

    def serve(arrivals: Sequence[float]) -> Served:
        ended, now = {}, 0.0
        for video, arrival in enumerate(arrivals):
            now = max(now, arrival) + seconds[video]
            ended[video] = now
        return Served(ended, alone.computed, alone.results)

    return serve


def by_batches(setting: Setting) -> Server:
    """All that wait run as one batch with one decision; the next batch begins when it is done."""
    one = replace(setting.policy, per_video=False)

    def serve(arrivals: Sequence[float]) -> Served:
        served, now = Served({}, {}, {}), 0.0
        waiting = list(range(len(arrivals)))
        handle = adacache.enable(setting.model, one, num_steps=setting.steps)
        try:
            while waiting:
                now = max(now, arrivals[waiting[0]])
                batch = [video for video in waiting[: setting.slots] if arrivals[video] <= now]
                waiting = waiting[len(batch) :]
                begin = time.thread_time()
                results = setting.sample(batch)
                now += time.thread_time() - begin
                for row, video in enumerate(batch):
                    served.ended[video] = now
                    served.computed[video] = len(handle.trace.computed_steps)
                    served.results[video] = results[row : row + 1]
        finally:
            adacache.disable(setting.model)
        return served

    return serve


def arrivals_at(load: float | None, seconds: float, videos: int, seed: int) -> list[float]:
    """Poisson arrivals at a load of the server that takes `seconds` per video; None: all at once."""
    if load is None:
        return [0.0] * videos
    source, now, found = random.Random(seed), 0.0, []
    for _ in range(videos):
        now += source.expovariate(load / seconds)
        found.append(now)
    return found


def figures(served: Served, arrivals: Sequence[float], alone: Served) -> dict[str, Any]:
    """The row of one server at one load."""
    waits = [served.ended[video] - arrival for video, arrival in enumerate(arrivals)]
    cuts = quantiles(waits, n=20, method="inclusive") if len(waits) > 1 else waits * 19
    differences = [
        float((served.results[video] - result).abs().max()) for video, result in alone.results.items()
    ]
    return {
        "videos_per_s": len(arrivals) / max(served.ended.values()),
        "p50_s": cuts[9],
        "p95_s": cuts[18],
        "mean_s": fmean(waits),
        "computed_steps": fmean(served.computed.values()),
        "largest_difference_from_one_by_one": max(differences),
        "latencies_s": waits,
    }


def run(setting: Setting, loads: Sequence[float | None], seed: int = 0) -> dict[str, Any]:
    """The figures of all servers at all loads."""
    setting.sample([0])  # first calls allocate
    alone, seconds = one_by_one(setting)
    servers: dict[str, Server] = {
        SLOTS: by_engine(setting, setting.policy),
        ONE_PER_CALL: by_engine(setting, setting.policy, 1),
        ONE_BY_ONE: in_turn(alone, seconds),
        NO_CACHE: by_engine(setting, None),
        ONE_DECISION: by_batches(setting),
    }
    results: dict[str, dict[str, Any]] = {}
    for share in loads:
        arrivals = arrivals_at(share, fmean(seconds), len(setting.prompts), seed)
        key = "all" if share is None else f"{share:g}"
        results[key] = {name: figures(serve(arrivals), arrivals, alone) for name, serve in servers.items()}
    return {
        "format": "adacache serving benchmark",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, CPU time",
        "videos": len(setting.prompts),
        "steps": setting.steps,
        "slots": setting.slots,
        "policy": setting.policy.describe(),
        "seconds_one_by_one": seconds,
        "computed_one_by_one": list(alone.computed.values()),
        "loads": results,
    }


def merged(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over repeats; the range of the throughput shows how much they differ."""
    report = {**reports[0], "repeats": len(reports), "loads": {}}
    for share in reports[0]["loads"]:
        rows: dict[str, dict[str, Any]] = {}
        for name in reports[0]["loads"][share]:
            same = [one["loads"][share][name] for one in reports]
            columns = {key: [row[key] for row in same] for key in same[0]}
            latencies = columns.pop("latencies_s")
            rows[name] = {key: median(values) for key, values in columns.items()}
            rows[name]["latencies_s"] = latencies
            rates = [row["videos_per_s"] for row in same]
            rows[name]["videos_per_s_range"] = [min(rates), max(rates)]
        report["loads"][share] = rows
    report["seconds_one_by_one"] = [one["seconds_one_by_one"] for one in reports]
    return report


def draw(report: dict[str, Any], path: Path) -> None:
    """Plots throughput and latency of all servers by load."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = figure.subplots(1, 3)
    loads = report["loads"]
    names = list(next(iter(loads.values())))
    for panel, (key, title) in zip(
        panels,
        (("videos_per_s", "videos per second"), ("p50_s", "median latency, s"), ("p95_s", "95 % latency, s")),
        strict=True,
    ):
        for i, name in enumerate(names):
            places = [place + 0.16 * (i - 2) for place in range(len(loads))]
            values = [rows[name][key] for rows in loads.values()]
            panel.bar(places, values, 0.16, color=COLORS[i], label=name)
        panel.set_xticks(range(len(loads)), [f"load {key}" if key != "all" else key for key in loads])
        panel.set_title(title)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=120)


def mixed_prompts(videos: int, seed: int = 0) -> list[Prompt]:
    """Held-out prompts of all motion classes in random order."""
    prompts = held_out_prompts()
    random.Random(seed).shuffle(prompts)
    return [prompts[i % len(prompts)] for i in range(videos)]


def main(arguments: Sequence[str] | None = None, model: STDiT3 | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--videos", type=whole_number(2), default=24)
    parser.add_argument("--steps", type=whole_number(2), default=30)
    parser.add_argument("--slots", type=whole_number(1), default=8)
    parser.add_argument("--policy", default="digits/fast", help="a preset of AdaCache")
    parser.add_argument("--loads", default="0.7,all", help="such as 0.5,0.7,0.9,all")
    parser.add_argument("--repeats", type=whole_number(1), default=3, help="the figures are medians")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args(arguments)
    loads = [None if load == "all" else float(load) for load in options.loads.split(",")]
    if any(load is not None and not (math.isfinite(load) and load > 0) for load in loads):
        parser.error(f"--loads: expected positive numbers or all, got {options.loads}")
    torch.set_num_threads(1)  # the CPU time of one thread is the clock
    setting = Setting(
        model or load().requires_grad_(False),
        preset(options.policy, options.steps),
        mixed_prompts(options.videos, options.seed),
        options.steps,
        options.slots,
    )
    report = merged([run(setting, loads, options.seed) for _ in range(options.repeats)])
    for load_name, rows in report["loads"].items():
        print(f"load {load_name}, {options.videos} videos of {options.steps} steps, {options.slots} slots")
        print_table(
            ("server", "videos/s", "p50 s", "p95 s", "computed", "difference"),
            [
                (
                    name,
                    f"{row['videos_per_s']:.3f}",
                    f"{row['p50_s']:.2f}",
                    f"{row['p95_s']:.2f}",
                    f"{row['computed_steps']:.1f}",
                    f"{row['largest_difference_from_one_by_one']:.1e}",
                )
                for name, row in rows.items()
            ],
        )
    if options.json is not None:
        write_json(options.json, report)
    if options.plot is not None:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        draw(report, options.plot)
    return report


if __name__ == "__main__":
    main()

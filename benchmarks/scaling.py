# SPDX-License-Identifier: Apache-2.0
"""Predicts how AdaCache scales over GPUs that split the tokens of one video: STDiT3-XL/2, 1 to 64 GPUs.

Nothing here is measured on a GPU. The messages of each step are counted in real runs of a small network on
gloo processes, and must be those that the model predicts for it. Only then is it evaluated for the large one.

    python benchmarks/scaling.py --json build/bench/scaling.json --plot build/bench/scaling.png
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import adacache
import torch
import torch.distributed as dist
from adacache.commands.flops import VIDEOS, count_flops, latent_size
from adacache.commands.options import real_number, whole_number
from adacache.commands.table import print_table
from adacache.files import write_json
from adacache.models.sequence_parallel import SequenceParallel
from adacache.models.stdit3 import STDiT3, STDiT3Config
from adacache.plots import draw_curves

import adacache_kernels

COUNTS = (1, 2, 4, 8, 16, 32, 64)
STEPS = 30
COMPUTED = 12.4
"""Mean computed steps of AdaCache-fast, from the published FLOPs (1331.97 of 3230.24 TFLOP)."""
PUBLISHED = {
    "baseline": {1: 54.02, 2: 29.28, 4: 18.08, 8: 12.95},
    "PAB": {1: 40.23, 2: 20.77, 4: 13.63, 8: 10.31},
    "AdaCache": {1: 24.16, 2: 14.02, 4: 9.56, 8: 7.78},
}
"""Seconds per video of Open-Sora 1.2, 480p-2s, on A100 GPUs (arXiv 2411.02397, multi-GPU table)."""
GOAL = 0.95


@dataclass(frozen=True)
class Machine:
    """A cluster.

    Attributes:
        per_node: GPUs joined by NVLink.
        nvlink, network: bytes per second that a GPU sends, inside and between nodes.
        nvlink_latency, network_latency: seconds of the smallest collective.
        memory: bytes per second.
        flops: per second, as reached by the network.
        host: seconds in which a process launches the kernels of a computed and of a reused step.
    """

    per_node: int = 8
    nvlink: float = 225e9
    network: float = 20e9
    nvlink_latency: float = 15e-6
    network_latency: float = 35e-6
    memory: float = 1.4e12
    flops: float = 66e12
    host: tuple[float, float] = (20e-3, 1e-3)


@dataclass(frozen=True)
class Network:
    """STDiT3 on one video: what its messages depend on.

    Attributes:
        pairs: of spatial and temporal blocks.
        width: channels.
        rows: of the batch.
        frames, positions: of the latent, in tokens.
        outputs: channels of the output per token.
        element: bytes of an activation.
        sites, strides: of the decisions.
    """

    pairs: int
    width: int
    rows: int
    frames: int
    positions: int
    outputs: int
    element: int = 2
    sites: int = 1
    strides: tuple[int, ...] = (1,)

    @property
    def tokens(self) -> int:
        return self.rows * self.frames * self.positions


@dataclass(frozen=True)
class Messages:
    """What one rank takes part in.

    Attributes:
        count: collectives.
        size: bytes of this rank's operand of each.
    """

    count: int
    size: float


def messages(network: Network, gpus: int, computed: bool) -> dict[str, Messages]:
    """Messages of one step, where ranks split the frames. The border is that of a rank with a predecessor."""
    own = network.tokens / gpus
    found = {"all_gather": Messages(1, own * network.outputs * network.element)}
    if computed and gpus > 1:
        columns = len(adacache_kernels.sum_columns(network.strides))
        found["all_to_all"] = Messages(2 * network.pairs, own * network.width * network.element)
        found["all_reduce"] = Messages(network.sites, columns * 8.0)
        reach = max(network.strides) * network.rows * network.positions
        found["border"] = Messages(network.sites, reach * network.width * network.element)
    return found if gpus > 1 else {}


def seconds_of(kind: str, one: Messages, gpus: int, machine: Machine) -> float:
    """Seconds of messages: latency, and the bytes that a rank sends to its node and to others."""
    neighbours = min(gpus, machine.per_node) - 1
    others = gpus - 1 - neighbours
    latency = machine.nvlink_latency + (machine.network_latency if others else 0.0)
    if kind in ("all_reduce", "border"):  # a border has one receiver; sums are latency alone
        slowest = machine.network if others else machine.nvlink
        return one.count * (latency + one.size / slowest)
    per_rank = one.size / gpus if kind == "all_to_all" else one.size
    inside, outside = per_rank * neighbours / machine.nvlink, per_rank * others / machine.network
    return one.count * (latency + max(inside, outside))


def step_seconds(
    network: Network, flops: float, gpus: int, machine: Machine, computed: bool, deciding: bool = True
) -> dict[str, float]:
    """Seconds of one step: on the device, and for messages by kind; "step" is their sum, or the
    host's seconds if those are more."""
    found = messages(network, gpus, computed)
    if not deciding:
        found = {kind: one for kind, one in found.items() if kind not in ("all_reduce", "border")}
    times = {kind: seconds_of(kind, one, gpus, machine) for kind, one in found.items()}
    # Every rank embeds the whole latent; three passes over its own tokens add the kept residual.
    whole = 2 * network.tokens * network.width * network.element / machine.memory
    passes = 0.0 if computed else 3 * network.tokens * network.width * network.element / gpus / machine.memory
    device = flops / gpus / machine.flops + whole + passes
    total = max(device + sum(times.values()), machine.host[0 if computed else 1])
    return {"device": device, **times, "step": total}


def predictions(
    network: Network,
    flops: tuple[float, float],
    machine: Machine,
    fixed: float,
    counts: Sequence[int] = COUNTS,
) -> list[dict[str, Any]]:
    """One row per number of GPUs.

    Args:
        flops: of a computed and of a reused step.
        fixed: seconds per video outside the denoising loop, which GPUs do not share.
    """
    rows: list[dict[str, Any]] = []
    for gpus in counts:
        plain = step_seconds(network, flops[0], gpus, machine, True, deciding=False)
        computed = step_seconds(network, flops[0], gpus, machine, True)
        reused = step_seconds(network, flops[1], gpus, machine, False)
        baseline = STEPS * plain["step"]
        cached = COMPUTED * computed["step"] + (STEPS - COMPUTED) * reused["step"]
        rows.append(
            {
                "gpus": gpus,
                "computed_step_s": computed,
                "reused_step_s": reused,
                "computed_step_bytes": wire_bytes(network, gpus, True),
                "reused_step_bytes": wire_bytes(network, gpus, False),
                "baseline_s": baseline + fixed,
                "adacache_s": cached + fixed,
                "loop_speedup": baseline / cached,
                "speedup": (baseline + fixed) / (cached + fixed),
            }
        )
    for row in rows:
        row["loop_kept"] = row["loop_speedup"] / rows[0]["loop_speedup"]
        row["kept"] = row["speedup"] / rows[0]["speedup"]
    return rows


def wire_bytes(network: Network, gpus: int, computed: bool) -> dict[str, float]:
    """Bytes that one rank sends in a step, by kind of message."""
    found = {}
    for kind, one in messages(network, gpus, computed).items():
        peers = {
            "all_to_all": (gpus - 1) / gpus,
            "all_gather": gpus - 1.0,
            "all_reduce": 2 * (gpus - 1) / gpus,
        }
        found[kind] = one.count * one.size * peers.get(kind, 1.0)
    return found


def fitted(flops: tuple[float, float], machine: Machine, network: Network) -> tuple[Machine, float]:
    """The machine with the rate that gives the published seconds on one GPU, and the seconds outside the
    loop."""
    saved = PUBLISHED["baseline"][1] - PUBLISHED["AdaCache"][1]
    rate = machine.flops
    for _ in range(50):
        now = replace(machine, flops=rate)
        computed = step_seconds(network, flops[0], 1, now, True)["step"]
        reused = step_seconds(network, flops[1], 1, now, False)["step"]
        rate *= (STEPS - COMPUTED) * (computed - reused) / saved
    computed = step_seconds(network, flops[0], 1, replace(machine, flops=rate), True)["step"]
    return replace(machine, flops=rate), PUBLISHED["baseline"][1] - STEPS * computed


# Counting the messages of real runs.

SMALL = STDiT3Config(
    depth=2, hidden_size=16, num_heads=2, caption_channels=12, model_max_length=5, input_sq_size=8
)
SMALL_LATENT = (8, 4, 8)
CODEBOOK = {0.2: 5, 0.4: 4, 0.6: 3, 0.8: 2, 1.0: 1}


def small_network() -> Network:
    frames, height, width = SMALL_LATENT
    patch = math.prod(SMALL.patch_size)
    return Network(SMALL.depth, SMALL.hidden_size, 2, frames, height * width // 4, 8 * patch, element=4)


def counted() -> list[dict[str, Any]]:
    """The messages of each step of a run on one rank: whether it computed, {kind: count}, {kind: bytes}."""
    found: list[tuple[str, int]] = []
    plain = {name: getattr(dist, name) for name in ("all_reduce", "all_gather", "all_to_all_single")}
    receive = dist.batch_isend_irecv

    def noted(kind: str, operand: int, function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            whole_numbers = (
                args[operand].dtype == torch.int64
            )  # shapes, which ranks compare in the first step
            size = args[operand].numel() * args[operand].element_size()
            found.append(("shapes" if whole_numbers else kind, size))
            return function(*args, **kwargs)

        return run

    def exchange(operations: list[Any]) -> Any:
        received = [one.tensor for one in operations if one.op is dist.irecv]
        found.extend(("border", tensor.numel() * tensor.element_size()) for tensor in received)
        return receive(operations)

    dist.all_reduce = noted("all_reduce", 0, plain["all_reduce"])
    dist.all_gather = noted("all_gather", 1, plain["all_gather"])
    dist.all_to_all_single = noted("all_to_all", 1, plain["all_to_all_single"])
    dist.batch_isend_irecv = exchange
    torch.manual_seed(0)
    model = STDiT3(SMALL).eval().requires_grad_(False)
    model.sequence = SequenceParallel(dist.group.WORLD, "frames")
    motion = adacache.MotionRegularization(window=(2, 11), scale=0.8, power=2.0)
    handle = adacache.enable(model, adacache.AdaCache(codebook=CODEBOOK, motion=motion), num_steps=12)
    latent, captions = torch.randn(2, 4, *SMALL_LATENT), torch.randn(2, 1, 5, 12)
    by_step = []
    with torch.no_grad():
        for step in range(12):
            found.clear()
            latent = latent - model(latent, torch.full((2,), 1000.0 - 80 * step), captions)[:, :4] / 12
            by_step.append(list(found))
    steps = []
    for number, (made, computed) in enumerate(zip(by_step, handle.trace.computed, strict=True), 1):
        shapes = [one for one in made if one[0] == "shapes"]
        if len(shapes) != (number == 1):
            raise RuntimeError(f"step {number}: the ranks compared their shapes {len(shapes)} times")
        made = [one for one in made if one[0] != "shapes"]
        kinds: Counter[str] = Counter(kind for kind, _ in made)
        sizes = {kind: sorted({size for one, size in made if one == kind}) for kind in kinds}
        steps.append({"computed": any(computed), "count": dict(kinds), "bytes": sizes})
    return steps


def measured(size: int) -> list[dict[str, Any]]:
    """The messages of the last rank of a run on this number of processes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--count", folder]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        processes = [
            subprocess.Popen(
                [*command, str(rank), str(size)], stdout=subprocess.PIPE, text=True, env=environment
            )
            for rank in range(size)
        ]
        try:
            outputs = [process.communicate(timeout=300)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
    if any(process.returncode for process in processes):
        raise RuntimeError(f"a run on {size} processes failed")
    found: list[dict[str, Any]] = json.loads(outputs[-1])
    return found


def count(folder: str, rank: str, size: str) -> None:
    """Prints the messages of one rank."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, rank=int(rank), world_size=int(size))
    print(json.dumps(counted()))


def check_measured(size: int, steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Compares a run's messages with those that the model predicts.

    Raises:
        RuntimeError: they differ, or no step was reused.
    """
    network = small_network()
    report: dict[str, Any] = {}
    for name, computed in (("computed", True), ("reused", False)):
        some = [step for step in steps if step["computed"] is computed]
        expected = messages(network, size, computed)
        counts = {kind: one.count for kind, one in expected.items()}
        sizes = {kind: [int(one.size)] for kind, one in expected.items()}
        if not some:
            raise RuntimeError(f"no step of the run on {size} processes was {name}")
        for step in some:
            if (step["count"], step["bytes"]) != (counts, sizes):
                raise RuntimeError(
                    f"{size} processes, {name} step: predicted {counts} of {sizes} bytes, counted {step}"
                )
        report[name] = {kind: asdict(one) for kind, one in expected.items()}
        report[f"{name}_steps"] = len(some)
    return report


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    default = Machine()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--video", choices=sorted(VIDEOS), default="480p-2s")
    parser.add_argument(
        "--processes", default="2,4", help="numbers of gloo processes whose messages are counted"
    )
    parser.add_argument("--per-node", type=whole_number(1), default=default.per_node)
    for name, unit, of in (
        ("nvlink", 1e9, "GB/s that a GPU sends inside a node: 3/4 of the 300 of NVLink 3"),
        ("network", 1e9, "GB/s that a GPU sends to other nodes: 4/5 of the 25 of InfiniBand HDR"),
        ("nvlink_latency", 1e-6, "microseconds of the smallest collective inside a node"),
        ("network_latency", 1e-6, "further microseconds between nodes"),
        ("memory", 1e9, "GB/s of the GPU's memory"),
    ):
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=real_number(above=0), default=getattr(default, name) / unit, help=of)
        parser.set_defaults(**{f"unit_{name}": unit})
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args(arguments)
    names = ("nvlink", "network", "nvlink_latency", "network_latency", "memory")
    given = {name: getattr(options, name) * getattr(options, f"unit_{name}") for name in names}
    machine = replace(default, per_node=options.per_node, **given)

    counts = [int(size) for size in options.processes.split(",") if size]
    checked = {str(size): check_measured(size, measured(size)) for size in counts}
    config = STDiT3Config()
    outputs = 8 * math.prod(config.patch_size)

    def network_of(latent: tuple[int, int, int]) -> Network:
        frames, height, width = latent
        return Network(config.depth, config.hidden_size, 2, frames, -(-height // 2) * -(-width // 2), outputs)

    fit_latent = latent_size(*VIDEOS["480p-2s"])
    fit = count_flops(fit_latent)
    machine, fixed = fitted((fit.computed, fit.reused), machine, network_of(fit_latent))
    latent = latent_size(*VIDEOS[options.video])
    network, flops = network_of(latent), count_flops(latent)
    rows = predictions(network, (flops.computed, flops.reused), machine, fixed)
    report = {
        "note": "a prediction; only the messages of the gloo runs were counted",
        "video": options.video,
        "machine": asdict(machine),
        "fixed_s": fixed,
        "network": asdict(network),
        "counted_messages": checked,
        "goal_loop_kept_at_8": GOAL,
        "rows": rows,
        "published_s": PUBLISHED,
    }
    show(report)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.json, report)
    if options.plot:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        curves = {
            "predicted, denoising loop": [(row["gpus"], row["loop_speedup"]) for row in rows],
            "predicted, with text encoder and autoencoder": [(row["gpus"], row["speedup"]) for row in rows],
            "published (A100)": [(gpus, ratio) for gpus, ratio in published_speedups().items()],
        }
        draw_curves(curves, options.plot, "GPUs", "speedup of AdaCache-fast over all steps")
    return report


def published_speedups() -> dict[int, float]:
    return {gpus: plain / PUBLISHED["AdaCache"][gpus] for gpus, plain in PUBLISHED["baseline"].items()}


def show(report: dict[str, Any]) -> None:
    """Prints the table."""
    print(f"Prediction, {report['video']}; counted messages as predicted: {list(report['counted_messages'])}")
    published = published_speedups() if report["video"] == "480p-2s" else {}
    table = []
    for row in report["rows"]:
        gpus = row["gpus"]
        sent = [sum(row[f"{name}_step_bytes"].values()) / 1e6 for name in ("computed", "reused")]
        seconds = [1e3 * row[f"{name}_step_s"]["step"] for name in ("computed", "reused")]
        decision = sum(row["computed_step_s"].get(kind, 0.0) for kind in ("all_reduce", "border"))
        table.append(
            [
                gpus,
                *(f"{value:.1f}" for value in (*sent, *seconds)),
                f"{1e6 * decision:.0f}",
                f"{row['loop_speedup']:.2f} ({row['loop_kept']:.0%})",
                f"{row['speedup']:.2f} ({row['kept']:.0%})",
                f"{published[gpus]:.2f} ({published[gpus] / published[1]:.0%})" if gpus in published else "-",
            ]
        )
    print_table(
        [
            "GPUs",
            "MB, computed",
            "MB, reused",
            "ms, computed",
            "ms, reused",
            "us, decision",
            "loop (kept)",
            "video (kept)",
            "published (kept)",
        ],
        table,
    )
    kept = next(row["loop_kept"] for row in report["rows"] if row["gpus"] == 8)
    print(
        f"goal of the loop at 8 GPUs: {GOAL:.0%}, predicted {kept:.1%}: {'met' if kept >= GOAL else 'MISSED'}"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--count"]:
        count(*sys.argv[2:])
    else:
        main()

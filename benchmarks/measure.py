# SPDX-License-Identifier: Apache-2.0
"""Timing for the benchmarks: medians over interleaved rounds of all candidates, and facts about the
machine."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import adacache_kernels

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one candidate over the rounds."""

    name: str
    median: float
    least: float
    most: float


def measure(
    candidates: dict[str, Callable[[int], object]], device: torch.device, *, repeat: int, warmup: int = 2
) -> dict[str, Timing]:
    """Times every candidate once per round, so that changes in machine speed affect all of them.

    A candidate is called with the number of the round, which selects a set of inputs. Its result is freed
    before the next candidate runs.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(warmup + repeat):
        for name, candidate in candidates.items():
            elapsed = _time(candidate, turn, device)
            if turn >= warmup:
                times[name].append(elapsed)
    return {
        name: Timing(name, statistics.median(values), min(values), max(values))
        for name, values in times.items()
    }


def input_sets(bytes_per_set: int, device: torch.device) -> int:
    """The number of input sets to rotate, so that none is still cached when it is used again."""
    sets = 1 + -(-_cache_bytes(device) // max(bytes_per_set, 1))
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return max(1, min(sets, free // (4 * max(bytes_per_set, 1))))
    return max(1, min(sets, 64))


def environment(device: torch.device) -> dict[str, Any]:
    """Device, versions, backends and commit of the measurements."""
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "backend": {
            choice.op: choice.backend
            for choice in adacache_kernels.backend_report()
            if choice.device == device.type
        },
    }
    if device.type == "cuda":
        facts["cuda"] = torch.version.cuda
    else:
        facts["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    facts["commit"] = commit.stdout.strip() if commit.returncode == 0 else None
    return facts


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints the first column left-aligned, the others right-aligned."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        print("  ".join(cells).rstrip())


def write_json(path: Path, facts: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts, indent=1) + "\n")


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--repeat", type=int, default=15, help="rounds (default: 15)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")


def refuse(reason: str) -> None:
    """Exits because a result is wrong."""
    sys.exit(f"not timed: {reason}")


def graph_milliseconds(candidate: Callable[[int], object], device: torch.device, calls: int = 100) -> float:
    """The time of one of `calls` calls in a CUDA graph, without launch overhead."""
    candidate(0)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for turn in range(calls):
            candidate(turn)
    timing = measure({"": lambda turn: graph.replay()}, device, repeat=20)[""]
    return timing.median / calls


def _time(candidate: Callable[[int], object], turn: int, device: torch.device) -> float:
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        # The device sleeps while the host launches the candidate, so that launch overhead is not measured.
        torch.cuda._sleep(1_000_000)
        begin.record()
        result = candidate(turn)
        end.record()
        torch.cuda.synchronize(device)
        del result
        return begin.elapsed_time(end)
    start = time.perf_counter()
    result = candidate(turn)
    elapsed = time.perf_counter() - start
    del result
    return elapsed * 1e3


def _cache_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("*/size")]
    kibibytes = [int(size.removesuffix("K")) for size in sizes if size.endswith("K")]
    return max(kibibytes, default=256 * 1024) * 1024


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()

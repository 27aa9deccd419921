"""On a machine with a GPU: runs the op tests for cuda and triton, then the benchmarks; keeps all as JSON.

Writes benchmarks/results/DEVICE-COMMIT.json with device, versions, commit, the tests' outcome, the figures.
Usage: python tools/gpu_check.py [--no-tests] [--no-benchmarks]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import adacache_kernels

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BACKENDS = ("cuda", "triton")
# As in a 480p and a 720p video of two seconds, with guidance.
BENCHMARKS = {
    "metric_site 480p float32": ["metric_site.py", "--dtype", "float32", "--places", "1590"],
    "metric_site 480p bfloat16": ["metric_site.py", "--dtype", "bfloat16", "--places", "1590"],
    "metric_site 720p bfloat16": ["metric_site.py", "--dtype", "bfloat16", "--places", "3600"],
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--no-benchmarks", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU: torch.cuda.is_available() is false. Without one: make test kernel-report")

    results = facts()
    print(json.dumps(results, indent=1), flush=True)
    failed = False
    if not arguments.no_tests:
        results["tests"] = {backend: run_tests(backend) for backend in BACKENDS}
        failed = any(outcome["exit_status"] for outcome in results["tests"].values())
    if not arguments.no_benchmarks:
        if failed:
            print("benchmarks: not run, they would measure wrong kernels", flush=True)
        else:
            results["benchmarks"] = {name: run_benchmark(name) for name in BENCHMARKS}
            failed = any(outcome["exit_status"] for outcome in results["benchmarks"].values())

    RESULTS.mkdir(parents=True, exist_ok=True)
    device = re.sub(r"\W+", "-", results["device"]["name"]).strip("-").lower()
    path = RESULTS / f"{device}-{results['commit'][:12]}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"gpu-check: {'FAILED' if failed else 'passed'}, results in {path.relative_to(ROOT)}")
    return 1 if failed else 0


def facts() -> dict[str, Any]:
    """What the figures belong to."""
    device = torch.cuda.get_device_properties(0)
    return {
        "commit": git("rev-parse", "HEAD")
        + ("+changes" if git("status", "--porcelain") not in ("", "unknown") else ""),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": {
            "name": device.name,
            "capability": f"{device.major}.{device.minor}",
            "memory_gib": round(device.total_memory / 2**30, 1),
            "multiprocessors": device.multi_processor_count,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": version_of("triton"),
        },
        "build": adacache_kernels.build_info(),
    }


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def version_of(package: str) -> str:
    try:
        return str(__import__(package).__version__)
    except ImportError:
        return "not installed"


def run_tests(backend: str) -> dict[str, Any]:
    print(f"\n== tests of {backend}", flush=True)
    environment = {**os.environ, "ADACACHE_TEST_BACKEND": backend}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "ops or gpu", "tests"]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    print(done.stdout, flush=True)
    return {
        "exit_status": done.returncode,
        "summary": (done.stdout.strip().splitlines() or [""])[-1].strip("= "),
    }


def run_benchmark(name: str) -> dict[str, Any]:
    print(f"\n== {name}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        script, *options = BENCHMARKS[name]
        command = [
            sys.executable,
            str(ROOT / "benchmarks" / script),
            "--device",
            "cuda",
            *options,
            "--json",
            str(path),
        ]
        status = subprocess.run(command, cwd=ROOT).returncode
        return {"exit_status": status, "figures": json.loads(path.read_text()) if path.exists() else None}


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""Builds for the GPU of this machine and runs the tests of cuda and triton, compute-sanitizer and benchmarks.

Writes benchmarks/results/DEVICE-COMMIT.json: device, versions, the outcome of each stage, and whether each
speed goal was reached. A stage that fails or exceeds its time limit does not stop later stages. Nothing is
installed or downloaded. --dry-run prints the commands, and fails if they import a package that is not in
NEEDED.
Usage: python tools/gpu_check.py [--stages build,tests,sanitizer,benchmarks] [--dry-run]
"""

from __future__ import annotations

import argparse
import ast
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
WORK = ROOT / "build" / "gpu"
BACKENDS = ("cuda", "triton")
BUILD_LIMIT = 240  # seconds; also a goal
#: Required packages and their minimum versions.
NEEDED = {
    "torch": "2.11",
    "triton": "",
    "setuptools": "77",
    "cmake": "3.20",
    "ninja": "",
    "pybind11": "2.13",
    "numpy": "",
    "safetensors": "",
    "pytest": "8",
    "pytest-timeout": "",
    "pytest-xdist": "",
    "hypothesis": "",
    "pillow": "",
    "matplotlib": "",
}
#: Packages for which a program on PATH is sufficient.
PROGRAMS = ("cmake", "ninja")
#: Modules that are imported only if they are installed.
OPTIONAL = {"flashinfer"}
SANITIZERS = ("memcheck", "racecheck", "initcheck")


@dataclass(frozen=True)
class Command:
    name: str
    arguments: list[str]
    environment: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*settings, shlex.join(self.arguments)])


@dataclass(frozen=True)
class Stage:
    """Commands with a common time limit in seconds. parallel: they run concurrently on the GPU."""

    name: str
    limit: int
    commands: list[Command]
    parallel: bool = False


@dataclass
class Outcome:
    """The result of a command. `status` is None after a timeout."""

    command: str
    status: int | None
    seconds: float
    summary: str


def main() -> int:
    arguments = parse_arguments()
    if arguments.can_run:
        lacks = missing_here()
        print(f"{sys.executable}: " + ("; ".join(lacks) if lacks else "all requirements are met"))
        return 1 if lacks else 0
    facts = device_facts() if not arguments.dry_run else {"device": {"name": "a GPU", "capability": "9.0"}}
    stages = [s for s in plan(facts["device"]["capability"]) if s.name in arguments.stages]
    if arguments.dry_run:
        print_plan(stages)
        unlisted = unlisted_imports(stages)
        for name, files in unlisted.items():
            print(f"NOT IN NEEDED: {name}, imported by {', '.join(files)}")
        return 1 if unlisted else 0
    lacks = missing_here()
    if lacks:
        raise SystemExit(f"gpu-check: {sys.executable}: {'; '.join(lacks)}")

    facts["commit"] = arguments.commit or commit()
    device = re.sub(r"\W+", "-", facts["device"]["name"]).strip("-").lower()
    path = RESULTS / f"{device}-{facts['commit'][:12]}.json"
    results = merged(json.loads(path.read_text()) if path.exists() else {}, facts)
    for stage in stages:
        results["stages"][stage.name] = run_stage(stage)
        if stage.name == "build":
            results["build"] = read_json(ROOT / "adacache_kernels" / "_build_info.json")
            results["registers"] = read_json(WORK / "registers.json")
        if stage.name == "benchmarks":
            results["benchmarks"] = {
                command.name: read_json(WORK / f"{command.name}.json") for command in stage.commands
            }
        results["goals"] = all_goals(results)
        write(results, path, arguments.also_to)  # after each stage, in case a later one is interrupted

    print_goals(results["goals"])
    failed = [name for name, stage in results["stages"].items() if not stage["passed"]]
    verdict = f"FAILED in {', '.join(failed)}" if failed else "passed"
    print(f"gpu-check: {verdict}; results in {path}, logs in {WORK}")
    return 1 if failed else 0


def parse_arguments() -> argparse.Namespace:
    names = [stage.name for stage in plan("9.0")]

    def stages(text: str) -> list[str]:
        asked = text.split(",")
        if unknown := [name for name in asked if name not in names]:
            raise argparse.ArgumentTypeError(
                f"expected stages from {','.join(names)}, got {','.join(unknown)}"
            )
        return asked

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--stages", type=stages, default=names, help="comma-separated stages to run; results are merged"
    )
    parser.add_argument("--commit", help="commit of the results; default: from git")
    parser.add_argument("--also-to", type=Path, metavar="DIR", help="also copy results and logs to DIR")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    parser.add_argument("--can-run", action="store_true", help="print missing requirements, run nothing")
    return parser.parse_args()


def plan(capability: str) -> list[Stage]:
    """All stages for a GPU of this compute capability."""
    python = sys.executable
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    build = {
        "ADACACHE_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST") or capability,
    }
    tests = []
    for backend, cases in (("cuda", "2000"), ("triton", "60")):  # Triton recompiles for most random cases
        asked = {"ADACACHE_TEST_BACKEND": backend, "ADACACHE_PROPERTY": cases}
        # test_triton_* need no GPU.
        ops = [*pytest, *workers(5), "tests/ops", "--ignore-glob=*test_triton_*"]
        tests.append(Command(f"ops-{backend}", ops, asked))
        tests.append(
            Command(f"property-{backend}", [*pytest, *workers(5), "-m", "property", "tests/property"], asked)
        )
    tests += [Command("gpu", [*pytest, "tests/gpu"]), Command("layer", [*pytest, "tests/layer"])]
    # One allocation per tensor, so that compute-sanitizer detects out-of-bounds accesses between tensors.
    apart = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    sanitize = [compute_sanitizer(), "--error-exitcode", "9"]
    sanitizer = [
        Command(
            f"{tool}-{backend}",
            [*sanitize, "--tool", tool, python, "tests/gpu/every_op.py", "--backend", backend],
            apart,
        )
        for tool in SANITIZERS
        for backend in BACKENDS
    ]
    benchmarks = []
    for name, options in (("kernels", ["720p-2s"]), ("kernels-480p", ["480p-2s", "--no-compile"])):
        results = ["--json", f"{WORK}/{name}.json", "--plot", f"{WORK}/{name}.png"]
        bench = [python, "benchmarks/kernels.py", "--device", "cuda", "--shape", *options, *results]
        benchmarks.append(Command(name, bench))
    return [
        Stage(
            "build",
            BUILD_LIMIT,
            [
                Command("build", [python, "setup.py", "build_ext", "--inplace"], build),
                Command(
                    "kernel-report", [python, "tools/kernel_report.py", "--json", f"{WORK}/registers.json"]
                ),
            ],
        ),
        Stage("tests", 330, tests, parallel=True),
        Stage("sanitizer", 190, sanitizer, parallel=True),
        Stage("benchmarks", 400, benchmarks),
    ]


def workers(count: int) -> list[str]:
    """Options of pytest-xdist if there are enough cores."""
    return ["-n", str(count)] if (os.cpu_count() or 1) >= 2 * count else []


def compute_sanitizer() -> str:
    """On PATH, otherwise in CUDA_HOME."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or f"{home}/bin/compute-sanitizer"


def missing_here() -> list[str]:
    """Missing requirements of this Python; empty if the check can run."""
    lacks = []
    for package, least in NEEDED.items():
        version = version_of(package)
        if version is None:
            lacks.append(f"{package} is not installed")
        elif least and numbers(version) < numbers(least):
            lacks.append(f"{package}: expected >= {least}, found {version}")
    if not lacks:
        import torch

        if not torch.cuda.is_available():
            lacks.append("torch.cuda.is_available() is False. Without a GPU, run: make test kernel-report")
    return lacks


def version_of(package: str) -> str | None:
    """The version of the installed package or, for PROGRAMS, of the program on PATH; None if not found."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        program = shutil.which(package) if package in PROGRAMS else None
    if program is None:
        return None
    done = subprocess.run([program, "--version"], capture_output=True, text=True)
    return next(iter(re.findall(r"\d+\.\d+[\d.]*", done.stdout)), "0")


def unlisted_imports(stages: Sequence[Stage]) -> dict[str, list[str]]:
    """Third-party modules that the scripts and tests of the stages import and that NEEDED does not provide,
    with the importing files."""
    known = modules_of(NEEDED) | OPTIONAL | set(sys.stdlib_module_names)
    words = {word for stage in stages for command in stage.commands for word in command.arguments}
    paths = [ROOT / word for word in sorted(words) if word.endswith(".py") or word.startswith("tests/")]
    files = [file for path in paths if path.exists() for file in scripts_of(path)]
    own = {file.stem for file in (*files, *(ROOT / "tests").rglob("*.py"))}
    known |= own | {"adacache", "adacache_kernels"}
    unlisted: dict[str, list[str]] = {}
    for file in files:
        for name in imported_modules(file) - known:
            unlisted.setdefault(name, []).append(str(file.relative_to(ROOT)))
    return unlisted


def scripts_of(path: Path) -> list[Path]:
    """The files of a folder; or a script with the modules of its folder that it imports, also indirectly."""
    if path.is_dir():
        return sorted(path.rglob("*.py"))
    found, waiting = {path}, [path]
    while waiting:
        imported = {path.with_name(f"{name}.py") for name in imported_modules(waiting.pop())}
        fresh = [file for file in imported - found if file.exists()]
        found.update(fresh)
        waiting += fresh
    return sorted(found)


def imported_modules(file: Path) -> set[str]:
    """Top-level names of all imports of a file, including those in functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


def modules_of(packages: Iterable[str]) -> set[str]:
    """Top-level modules of these packages and their requirements, if installed."""
    normal = {re.sub(r"[-_.]+", "-", package).lower() for package in packages}
    waiting = list(normal)
    while waiting:
        try:
            required = importlib.metadata.requires(waiting.pop()) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for requirement in required:
            name = re.sub(r"[-_.]+", "-", re.split(r"[\s;<>=!~\[(]", requirement, maxsplit=1)[0]).lower()
            if "extra ==" not in requirement and name not in normal:
                normal.add(name)
                waiting.append(name)
    return {
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if any(re.sub(r"[-_.]+", "-", owner).lower() in normal for owner in owners)
    }


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def print_plan(stages: Sequence[Stage]) -> None:
    for stage in stages:
        print(f"{stage.name}: at most {stage.limit} s" + (", in parallel" if stage.parallel else ""))
        for command in stage.commands:
            print(f"  {command}")
    print(f"total: at most {sum(stage.limit for stage in stages)} s")


def run_stage(stage: Stage) -> dict[str, Any]:
    """Runs all commands of a stage within its time limit, also after a failure."""
    print(f"\n== {stage.name}, at most {stage.limit} s", flush=True)
    started = time.monotonic()
    deadline = started + stage.limit
    outcomes = []
    if stage.parallel:
        running = [(command, start(command)) for command in stage.commands]
        outcomes = [finish(command, process, started, deadline) for command, process in running]
    else:
        for command in stage.commands:
            outcomes.append(finish(command, start(command), time.monotonic(), deadline))
    for outcome in outcomes:
        ended = "timeout" if outcome.status is None else f"exit status {outcome.status}"
        print(f"{outcome.command}: {ended}, {outcome.seconds:.0f} s: {outcome.summary}", flush=True)
    return {
        "passed": all(outcome.status == 0 for outcome in outcomes),
        "seconds": round(time.monotonic() - started, 1),
        "limit": stage.limit,
        "commands": [asdict(outcome) for outcome in outcomes],
    }


def start(command: Command) -> subprocess.Popen[bytes]:
    WORK.mkdir(parents=True, exist_ok=True)
    (WORK / f"{command.name}.json").unlink(missing_ok=True)  # of an earlier run
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **command.environment}
    print(f"$ {command}", flush=True)
    with (WORK / f"{command.name}.log").open("wb") as log:
        try:
            return subprocess.Popen(
                command.arguments,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            log.write(f"{error}\n".encode())
            return subprocess.Popen([sys.executable, "-c", "raise SystemExit(127)"])


def finish(command: Command, process: subprocess.Popen[bytes], started: float, deadline: float) -> Outcome:
    status: int | None
    try:
        status = process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # including child processes
        process.wait()
        status = None
    log = WORK / f"{command.name}.log"
    return Outcome(
        command.name,
        status,
        round(time.monotonic() - started, 1),
        summary_of(log.read_text(errors="replace")),
    )


def summary_of(log: str) -> str:
    """The summary line of the sanitizer or of pytest, otherwise the last line."""
    lines = [line.strip("= ") for line in log.splitlines() if line.strip("= ")]
    for pattern in (r"ERROR SUMMARY: .*|RACECHECK SUMMARY: .*", r"\d+ (?:passed|failed|error).* in .*s.*"):
        found = [match.group(0) for line in lines if (match := re.search(pattern, line))]
        if found:
            return found[-1]
    return lines[-1][-300:] if lines else "no output"


def device_facts() -> dict[str, Any]:
    """Date, device and versions of the results."""
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("torch.cuda.is_available() is False. Without a GPU, run: make test kernel-report")
    device = torch.cuda.get_device_properties(0)
    return {
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
            "triton": version_of("triton") or "not installed",
        },
    }


def commit() -> str:
    head = git("rev-parse", "HEAD")
    return head + ("+changes" if git("status", "--porcelain") not in ("", "unknown") else "")


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def read_json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def merged(earlier: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """New facts with the earlier results of the same commit and device type."""
    kept = {name: earlier.get(name) or {} for name in ("build", "registers", "stages", "benchmarks")}
    return {**facts, **kept, "goals": earlier.get("goals", [])}


def all_goals(results: dict[str, Any]) -> list[dict[str, Any]]:
    """All goals with their measured values: build time, then benchmarks."""
    goals = []
    for outcome in results["stages"].get("build", {}).get("commands", [])[:1]:
        goals.append(
            {
                "case": "build for this device",
                "what": "seconds",
                "asked": BUILD_LIMIT,
                "got": outcome["seconds"],
                "reached": outcome["status"] == 0 and outcome["seconds"] < BUILD_LIMIT,
                "at_most": True,
            }
        )
    for found in results["benchmarks"].values():
        goals += (found or {}).get("goals", [])
    return goals


def print_goals(goals: Sequence[dict[str, Any]]) -> None:
    print("\ngoals")
    for goal in goals:
        where = ", ".join(str(goal[name]) for name in ("shape", "dtype", "backend") if name in goal)
        limit = "<=" if goal["at_most"] else ">="
        mark = "reached" if goal["reached"] else "MISSED"
        print(
            f"  {mark}: {goal['case']} {where}: {goal['what']} {goal['got']:.3g} ({limit} {goal['asked']:g})"
        )


def write(results: dict[str, Any], path: Path, also_to: Path | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    if also_to:
        also_to.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, also_to)
        for file in WORK.glob("*"):
            shutil.copy2(file, also_to)


if __name__ == "__main__":
    sys.exit(main())

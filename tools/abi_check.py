# SPDX-License-Identifier: Apache-2.0
"""Builds the wheel under the installed torch and runs the op tests under other releases: one wheel must work
with all of them. Also compiles the sources of the libraries against the headers of each release.

Each torch is installed in a separate folder and shares the CUDA packages of the installed one. Usage:
python tools/abi_check.py [--torch torch==2.11.0] [--torch PATH.whl] [--tests EXPRESSION]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "abi"
OLDEST = "torch==2.11.0"
CPU_ONLY = "the newest CPU-only torch"
PROBE = """
import json, pathlib, torch, adacache_kernels
print(json.dumps({
    "torch": torch.__version__,
    "cuda": torch.version.cuda,
    "built": adacache_kernels.build_info(),
    "where": str(pathlib.Path(adacache_kernels.__file__).parent.parent),
}))
"""


@dataclass
class Outcome:
    """The results under one torch."""

    asked: str
    torch: str = "-"
    libraries: str = "-"
    tests: str = "-"
    fault: str = ""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--torch", action="append", help=f"a requirement or a wheel; default: {OLDEST} and {CPU_ONLY}"
    )
    parser.add_argument("--tests", default="ops and not slow", help="pytest's -m expression")
    arguments = parser.parse_args()

    site = install_wheel()
    tests = copy_tests()
    outcomes = [check("the torch of the build", None, site, tests, arguments.tests)]
    for asked in arguments.torch or [OLDEST, CPU_ONLY]:
        try:
            folder = install_torch(newest_cpu_only() if asked == CPU_ONLY else asked)
        except LookupError as error:
            outcomes.append(Outcome(asked, fault=str(error)))
            continue
        outcome = check(asked, folder, site, tests, arguments.tests)
        if faults := header_faults(folder / "torch", find_torch()):
            outcome.fault = "; ".join(filter(None, [outcome.fault, *faults]))
        outcomes.append(outcome)

    rows = [
        ("torch", "requirement", "libraries", "op tests", ""),
        *((o.torch, o.asked, o.libraries, o.tests, o.fault) for o in outcomes),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    print(
        "\n"
        + "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)
    )
    faulty = [o for o in outcomes if o.fault]
    print(f"abi-check: {len(outcomes) - len(faulty)} of {len(outcomes)} torch versions passed")
    return 1 if faulty else 0


def pip(*arguments: str) -> str:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    print("$ pip", *arguments, flush=True)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise LookupError(f"pip {arguments[0]}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    return done.stdout


def find_torch() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit("torch is not installed")
    return Path(spec.origin).parent


def install_wheel() -> Path:
    wheels, site = WORK / "wheel", WORK / "site"
    for folder in (wheels, site):
        shutil.rmtree(folder, ignore_errors=True)
    started = time.perf_counter()
    pip("wheel", "--no-build-isolation", "--no-deps", "-w", str(wheels), str(ROOT))
    wheel = next(wheels.glob("*.whl"))
    print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.2f} MiB, {time.perf_counter() - started:.0f} s")
    pip("install", "--no-deps", "--target", str(site), str(wheel))
    return site


def copy_tests() -> Path:
    """Copies the tests out of the source tree, so that they import the wheel."""
    folder = WORK / "run"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(ROOT / "pyproject.toml", folder)
    return folder


def newest_cpu_only() -> str:
    """The newest torch version with the suffix +cpu that pip lists for this Python."""
    listed = pip("index", "versions", "torch")
    match = re.search(r"Available versions: (.*)", listed)
    versions = [v for v in (match.group(1).split(", ") if match else []) if v.endswith("+cpu")]
    if not versions:
        raise LookupError("NOT RUN: pip lists no CPU-only torch for this Python; pass --torch PATH.whl")
    return f"torch=={versions[0]}"


def install_torch(asked: str) -> Path:
    folder = WORK / re.sub(r"[^\w.+-]+", "-", Path(asked).name)
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        pip("install", "--no-deps", "--target", str(folder), asked)
        if missing := missing_cuda_packages(folder):
            pip("install", "--upgrade", "--target", str(folder), *missing)
        (folder / "complete").touch()
    return folder


def missing_cuda_packages(folder: Path) -> list[str]:
    """The CUDA packages that this torch requires and the installed torch does not."""
    here = cuda_requirements(list(metadata.distributions(name="torch")))
    missing = []
    for name, requirement in cuda_requirements(list(metadata.distributions(path=[str(folder)]))).items():
        if name not in here:
            missing.append(str(requirement))
        elif extras := requirement.extras - here[name].extras:  # cuda-toolkit[cublas,cudart,...]
            missing.append(f"{requirement.name}[{','.join(sorted(extras))}]{requirement.specifier}")
    return missing


def cuda_requirements(distributions: list[metadata.Distribution]) -> dict[str, Requirement]:
    requirements = [
        Requirement(text) for d in distributions if d.name == "torch" for text in d.requires or []
    ]
    named = [r for r in requirements if r.name.startswith(("nvidia-", "cuda-"))]
    return {r.name: r for r in named if r.marker is None or r.marker.evaluate({"extra": ""})}


def header_faults(torch: Path, built_against: Path) -> list[str]:
    """Compiles csrc/torch/*.cpp against the headers of another torch, with the commands of the last build
    (syntax only). Sources that are not part of the build are not checked."""
    builds = sorted((ROOT / "build").glob("cmake-*/compile_commands.json"), key=lambda p: p.stat().st_mtime)
    faults = []
    sources = {str(path): path.name for path in sorted((ROOT / "csrc" / "torch").glob("*.cpp"))}
    for entry in json.loads(builds[-1].read_text()):
        name = sources.pop(entry["file"], None)
        if name is None:
            continue
        words = [word.replace(str(built_against), str(torch)) for word in shlex.split(entry["command"])]
        output = words.index("-o")
        command = [*words[:output], *words[output + 2 :], "-fsyntax-only"]
        done = subprocess.run(command, cwd=entry["directory"], capture_output=True, text=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if " error: " in line] or ["no message"]
            faults.append(f"{name} does not compile against the headers of this torch: {errors[0]}")
    for name in sources.values():
        print(f"NOT CHECKED against the headers of {torch.name}: {name}, which is not part of the build")
    return faults


def library_folders(torch: Path | None) -> list[str]:
    """Folders of CUDA libraries for LD_LIBRARY_PATH: of this torch, then of the installed one."""
    places = [p / "nvidia" for p in [torch, *map(Path, sys.path)] if p]
    return [str(folder) for place in places for folder in sorted(place.glob("*/lib"))]


def check(asked: str, torch: Path | None, site: Path, tests: Path, expression: str) -> Outcome:
    paths = [str(p) for p in (torch, site) if p]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    if torch:
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(library_folders(torch))
    probe = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=tests, env=environment, capture_output=True, text=True
    )
    outcome = Outcome(asked)
    if probe.returncode:
        outcome.fault = "import failed: " + (probe.stderr.strip().splitlines() or ["no message"])[-1]
        return outcome
    facts = json.loads(probe.stdout.splitlines()[-1])
    libraries = facts["built"]["libraries"]
    outcome.torch = facts["torch"]
    outcome.libraries = ", ".join(
        f"{name}{'' if library['loaded'] else ' missing'}" for name, library in libraries.items()
    )
    if Path(facts["where"]) != site:
        outcome.fault = f"imported from {facts['where']}, not from the wheel"
    wanted = ["cpu", "engine", *(["cuda"] if facts["built"]["cuda"]["built"] and facts["cuda"] else [])]
    for name in wanted:
        if not libraries[name]["loaded"]:
            outcome.fault = libraries[name]["reason"]
    print(f"\n== torch {outcome.torch} ({asked}): {outcome.libraries}", flush=True)
    # Triton kernels are not compiled into the wheel.
    options = ["-q", "-m", expression, "-p", "no:cacheprovider", "--ignore-glob=*triton*"]
    command = [sys.executable, "-m", "pytest", *options, "tests/ops"]
    done = subprocess.run(command, cwd=tests, env=environment, stdout=subprocess.PIPE, text=True)
    print(done.stdout, flush=True)
    outcome.tests = (done.stdout.strip().splitlines() or ["no output"])[-1].strip("= ")
    if done.returncode:
        outcome.fault = outcome.fault or f"pytest ended with exit status {done.returncode}"
    return outcome


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""CUDA kernel bodies, run on the host block by block under sanitizers, against plain loops.

Environment: CXX, the compiler (g++); ADACACHE_HOST_SEED, the seed of the random cases (0);
ADACACHE_HOST_FULL=1, hundreds of cases per op (minutes instead of seconds).
"""

import fcntl
import os
import pathlib
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

pytestmark = [
    pytest.mark.toolchain,
    pytest.mark.timeout(1800),  # the first test of each sanitizer compiles for minutes
]

ROOT = pathlib.Path(__file__).resolve().parents[2]
SEED = os.environ.get("ADACACHE_HOST_SEED", "0")
FULL = os.environ.get("ADACACHE_HOST_FULL") == "1"
CASES = {"address,undefined": 200 if FULL else 10, "thread": 200 if FULL else 4}


def build(sanitizers: str, scratch: pathlib.Path) -> pathlib.Path:
    """Compiles into build/, so that later runs reuse the objects."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None or shutil.which("make") is None:
        pytest.skip("no make, or no C++ compiler: set CXX, or install g++")
    (scratch / "empty.cpp").write_text("int main() {}\n")
    probe = [compiler, f"-fsanitize={sanitizers}", str(scratch / "empty.cpp"), "-o", str(scratch / "empty")]
    done = subprocess.run(probe, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"{compiler} lacks -fsanitize={sanitizers}: {done.stderr.strip()[-200:]}")
    folder = ROOT / "build" / "host_bodies" / sanitizers.replace(",", "-")
    folder.mkdir(parents=True, exist_ok=True)
    make = ["make", "-s", f"-j{os.cpu_count()}", "-f", "tools/host_bodies.mk", f"CXX={compiler}"]
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [*make, f"OUT={folder}", f"SANITIZE={sanitizers}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "kernels_on_host"


def run(program: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(program), "--seed", SEED, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    # Old ThreadSanitizers do not support the address randomization of new kernels.
    if "unexpected memory mapping" in result.stderr and shutil.which("setarch"):
        result = subprocess.run(["setarch", "-R", *command], capture_output=True, text=True, timeout=1800)
    return result


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    return {sanitizers: build(sanitizers, tmp_path_factory.mktemp("probe")) for sanitizers in CASES}


@pytest.fixture(scope="module")
def results(programs: dict[str, pathlib.Path]) -> dict[str, subprocess.CompletedProcess[str]]:
    """Results of all programs, which run in parallel."""
    with ThreadPoolExecutor() as jobs:
        waiting = {
            sanitizers: jobs.submit(run, program, "--cases", str(CASES[sanitizers]))
            for sanitizers, program in programs.items()
        }
        return {sanitizers: result.result() for sanitizers, result in waiting.items()}


@pytest.mark.parametrize("sanitizers", CASES)
def test_bodies_agree_with_plain_loops(
    results: dict[str, subprocess.CompletedProcess[str]], sanitizers: str
) -> None:
    result = results[sanitizers]
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr[:4000]
    assert f"{CASES[sanitizers]} random cases of each op passed" in result.stdout


def test_missing_barrier_is_detected(programs: dict[str, pathlib.Path]) -> None:
    result = run(programs["thread"], "--cases", "2", "--drop-barriers")
    assert result.returncode != 0
    assert "data race" in result.stderr

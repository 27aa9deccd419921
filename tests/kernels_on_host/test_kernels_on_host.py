"""The CUDA kernel bodies, run on the host block by block, against plain loops, under sanitizers.

Environment: CXX, the compiler (g++); ADACACHE_HOST_SEED, the seed of the random cases (0);
ADACACHE_HOST_FULL=1, hundreds of cases of each op instead of a few (minutes instead of seconds).
"""

import os
import pathlib
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

FOLDER = pathlib.Path(__file__).parent
SEED = os.environ.get("ADACACHE_HOST_SEED", "0")
FULL = os.environ.get("ADACACHE_HOST_FULL") == "1"
CASES = {"address,undefined": 200 if FULL else 10, "thread": 200 if FULL else 4}
# A few cases run for a shorter time than a better program takes to compile.
OPTIMISATION = "-O1" if FULL else "-O0"
WARNINGS = ["-Wall", "-Wextra", "-Werror"]


def run_command(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def build(directory: pathlib.Path, sanitizers: str, jobs: ThreadPoolExecutor) -> pathlib.Path:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler: set CXX, or install g++")
    sanitize = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    empty = directory / "empty.cpp"
    empty.write_text("int main() {}\n")
    probe = subprocess.run(
        [compiler, *sanitize, str(empty), "-o", str(directory / "empty")], capture_output=True, text=True
    )
    if probe.returncode != 0:
        pytest.skip(f"{compiler} lacks -fsanitize={sanitizers}: {probe.stderr.strip()[-200:]}")
    commands = []
    for source in sorted(FOLDER.glob("*.cpp"), key=lambda file: -file.stat().st_size):
        flags = sanitize
        if source.name == "host_block.cpp" and sanitizers == "thread":
            flags = ["-DADACACHE_THREAD_SANITIZER"]
        output = ["-c", str(source), "-o", str(directory / f"{source.stem}.o")]
        commands.append(
            [compiler, "-std=c++20", OPTIMISATION, "-g", "-ffp-contract=off", *WARNINGS, *flags, *output]
        )
    list(jobs.map(run_command, commands))
    program = directory / "kernels_on_host"
    run_command([compiler, *sanitize, *map(str, directory.glob("*.o")), "-o", str(program)])
    return program


def run(program: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(program), "--seed", SEED, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    # Old ThreadSanitizers and new kernels disagree on how far addresses are randomised.
    if "unexpected memory mapping" in result.stderr and shutil.which("setarch"):
        result = subprocess.run(["setarch", "-R", *command], capture_output=True, text=True, timeout=1800)
    return result


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    with ThreadPoolExecutor(os.cpu_count()) as jobs, ThreadPoolExecutor() as builds:
        waiting = {
            sanitizers: builds.submit(
                build, tmp_path_factory.mktemp(sanitizers.replace(",", "-")), sanitizers, jobs
            )
            for sanitizers in CASES
        }
        return {sanitizers: program.result() for sanitizers, program in waiting.items()}


@pytest.mark.parametrize("sanitizers", CASES)
def test_bodies_agree_with_plain_loops(programs: dict[str, pathlib.Path], sanitizers: str) -> None:
    result = run(programs[sanitizers], "--cases", str(CASES[sanitizers]))
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr[:4000]
    assert f"{CASES[sanitizers]} random cases of each op passed" in result.stdout


def test_a_missing_barrier_is_found(programs: dict[str, pathlib.Path]) -> None:
    result = run(programs["thread"], "--cases", "2", "--drop-barriers")
    assert result.returncode != 0
    assert "data race" in result.stderr

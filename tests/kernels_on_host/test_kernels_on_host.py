"""The CUDA kernel bodies, run on the host block by block with threads, against plain loops, under sanitizers.

Environment: CXX, the compiler (g++); ADACACHE_HOST_SEED, the seed of the random inputs (0);
ADACACHE_HOST_FULL=1, all cases under ThreadSanitizer too (minutes instead of seconds).
"""

import os
import pathlib
import shutil
import subprocess

import pytest

SOURCE = pathlib.Path(__file__).with_name("kernels_on_host.cpp")
SEED = os.environ.get("ADACACHE_HOST_SEED", "0")
# 7 has no factor in common with the three dtypes, so that a selection meets them all.
SELECTION = [] if os.environ.get("ADACACHE_HOST_FULL") == "1" else ["--every", "7"]


def build(directory: pathlib.Path, sanitizers: str) -> pathlib.Path:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler: set CXX, or install g++")
    program = directory / "kernels_on_host"
    flags = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-ffp-contract=off", "-pthread"]
    empty = directory / "empty.cpp"
    empty.write_text("#include <barrier>\nint main() { std::barrier<> b(1); b.arrive_and_wait(); }\n")
    command = [compiler, "-std=c++20", *flags]
    probe = subprocess.run(
        [*command, str(empty), "-o", str(directory / "empty")], capture_output=True, text=True
    )
    if probe.returncode != 0:
        pytest.skip(
            f"{compiler} lacks std::barrier or -fsanitize={sanitizers}: {probe.stderr.strip()[-200:]}"
        )
    built = subprocess.run(
        [*command, "-O1", "-g", "-Wall", "-Wextra", "-Werror", str(SOURCE), "-o", str(program)],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return program


def run(program: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(program), "--seed", SEED, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900)
    # Old ThreadSanitizers and new kernels disagree on how far addresses are randomised.
    if "unexpected memory mapping" in result.stderr and shutil.which("setarch"):
        result = subprocess.run(["setarch", "-R", *command], capture_output=True, text=True, timeout=900)
    return result


@pytest.fixture(scope="module")
def thread_checked(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return build(tmp_path_factory.mktemp("thread"), "thread")


def test_bodies_agree_with_plain_loops(tmp_path: pathlib.Path) -> None:
    result = run(build(tmp_path, "address,undefined"))
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "45 cases passed" in result.stdout


def test_bodies_have_no_races(thread_checked: pathlib.Path) -> None:
    result = run(thread_checked, *SELECTION)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr[:4000]
    assert "cases passed" in result.stdout


def test_a_missing_barrier_is_found(thread_checked: pathlib.Path) -> None:
    result = run(thread_checked, "--every", "1000", "--drop-barriers")
    assert result.returncode != 0
    assert "data race" in result.stderr

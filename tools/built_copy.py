# SPDX-License-Identifier: Apache-2.0
"""A copy of the sources with a separate build, for checks that change sources or compiler options."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

COPIED = ("adacache_kernels", "benchmarks", "csrc", "python", "tests", "tools", "CMakeLists.txt", "setup.py")
COPIED += ("pyproject.toml", "README.md", "LICENSE")


class BuildFailed(Exception):
    """The message is the end of the compiler output."""


def copy_sources(root: Path, tree: Path) -> None:
    """Updates the copy. Only changed files are written, so that the build recompiles only those."""
    wanted: set[Path] = set()
    for name in COPIED:
        source = root / name
        for file in [source] if source.is_file() else sorted(p for p in source.rglob("*") if p.is_file()):
            if is_made(file):
                continue
            target = tree / file.relative_to(root)
            wanted.add(target)
            if not target.exists() or target.read_bytes() != file.read_bytes():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
    for name in COPIED:
        for file in [p for p in (tree / name).rglob("*") if p.is_file()]:
            if file not in wanted and not is_made(file):
                file.unlink()


def is_made(file: Path) -> bool:
    return "__pycache__" in file.parts or file.suffix == ".so" or file.name == "_build_info.json"


def copy_libraries(root: Path, tree: Path) -> None:
    """Copies the built libraries, for a copy without a build."""
    for file in (root / "adacache_kernels").iterdir():
        if file.suffix == ".so" or file.name == "_build_info.json":
            shutil.copyfile(file, tree / "adacache_kernels" / file.name)


def build_copy(tree: Path, cmake_arguments: str) -> None:
    """Builds the CPU library and the engine in place.

    Raises:
        BuildFailed: the build failed.
    """
    arguments = f"{os.environ.get('CMAKE_ARGS', '')} {cmake_arguments}".strip()
    environment = {**os.environ, "ADACACHE_CUDA": "0", "CMAKE_ARGS": arguments}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise BuildFailed(f"{tree}: build failed:\n{(done.stdout + done.stderr)[-3000:]}")

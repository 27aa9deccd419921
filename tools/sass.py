# SPDX-License-Identifier: Apache-2.0
"""Finds the hot code of a CUDA kernel in its disassembly: the innermost loop that loads from and stores to
global memory, otherwise the longest loop that loads, otherwise the whole kernel.

Counts are static: both sides of a branch count, and an inner loop counts once.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str
    operands: str

    @property
    def bits(self) -> int:
        """Width of a memory access per thread."""
        return next((WIDTHS[part] for part in self.opcode.split(".") if part in WIDTHS), 32)


@dataclass(frozen=True)
class HotCode:
    """Instructions in the hot code of a kernel on one architecture, and its global memory accesses narrower
    than 16 bytes per thread."""

    kernel: str
    architecture: str
    instructions: int
    narrow_loads: int
    narrow_stores: int


def disassembler(nvcc: str | None) -> str:
    """The path of cuobjdump: on PATH, in the folder of nvcc, in CUDA_HOME, or from Triton.

    Raises:
        FileNotFoundError: not found.
    """
    folders = [os.environ.get("PATH", ""), str(Path(nvcc).resolve().parent) if nvcc else ""]
    folders.append(os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin"))
    try:
        import triton

        folders.append(str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin"))
    except ImportError:
        pass
    for folder in filter(None, folders):
        if found := shutil.which("cuobjdump", path=folder):
            return found
    raise FileNotFoundError(
        f"cuobjdump: not found in {', '.join(filter(None, folders[1:]))} or on PATH; it is part of the CUDA "
        "toolkit and of the package triton"
    )


def hot_code(objects: list[Path], tool: str) -> list[HotCode]:
    """The hot code of all kernels in these object files, per architecture."""

    def disassembled(file: Path) -> str:
        done = subprocess.run([tool, "-sass", str(file)], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{tool} -sass {file} failed: {done.stderr.strip()[-500:]}")
        return done.stdout

    with ThreadPoolExecutor(os.cpu_count()) as jobs:
        return [kernel for text in jobs.map(disassembled, objects) for kernel in parse(text)]


def parse(text: str) -> list[HotCode]:
    """Parses the output of cuobjdump for one file."""
    found: list[HotCode] = []
    architecture, kernel, code = "", "", list[Instruction]()

    def finish() -> None:
        if kernel:
            found.append(measure(kernel, architecture, code))

    for line in text.splitlines():
        if match := re.match(r"\s*(?:arch = |code for )(sm_\d+)", line):
            finish()
            architecture, kernel = match[1], ""
        elif match := re.search(r"Function : (\S+)", line):
            finish()
            kernel, code = match[1], []
        elif match := INSTRUCTION.match(line):
            code.append(Instruction(int(match[1], 16), match[3], match[4]))
    finish()
    return found


def measure(kernel: str, architecture: str, code: list[Instruction]) -> HotCode:
    hot = hottest(code)
    loads, stores = (sum(i.opcode.startswith(name) and i.bits < 128 for i in hot) for name in ("LDG", "STG"))
    return HotCode(kernel, architecture, len(hot), loads, stores)


def hottest(code: list[Instruction]) -> list[Instruction]:
    """The hot code as defined above; of several innermost loops, the longest."""
    bodies, loading = [], []
    for jump in code:
        target = re.search(r"\b0x([0-9a-f]+)$", jump.operands)
        if jump.opcode.startswith("BRA") and target and int(target[1], 16) < jump.address:
            body = [i for i in code if int(target[1], 16) <= i.address <= jump.address]
            loads, stores = (any(i.opcode.startswith(name) for i in body) for name in ("LDG", "STG"))
            if loads:
                (bodies if stores else loading).append(body)
    innermost = [
        body for body in bodies if not any(other is not body and contains(body, other) for other in bodies)
    ]
    if bodies or loading:
        return max(innermost or loading, key=len)
    # Slow paths and padding follow the last EXIT.
    exits = [number for number, i in enumerate(code) if i.opcode == "EXIT"]
    return code[: exits[-1] + 1] if exits else code


def contains(body: list[Instruction], other: list[Instruction]) -> bool:
    return body[0].address <= other[0].address and other[-1].address <= body[-1].address

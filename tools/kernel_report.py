# SPDX-License-Identifier: Apache-2.0
"""Prints for each CUDA kernel and architecture: registers, shared memory and spills from ptxas, blocks per
multiprocessor, and from the disassembly the instructions in the hot code and its global memory accesses
narrower than 16 bytes per thread.

Fails on a spill, on a value above its budget in tools/kernel_budgets.json, and on a kernel that is not
compiled for every architecture.
Usage: python tools/kernel_report.py [--build build/cmake-...] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import sass

ROOT = Path(__file__).resolve().parent.parent
# Budgets of each quantity by a pattern of the kernel name ("decide") or of kernel and architecture
# ("decide, sm_1??"). The longest matching pattern applies. null: no limit.
BUDGETS = ROOT / "tools" / "kernel_budgets.json"
SHORT_DTYPES = {
    "__nv_bfloat16": "bf16",
    "bfloat16": "bf16",
    "__half": "fp16",
    "float16": "fp16",
    "float": "fp32",
}


@dataclass
class Multiprocessor:
    """Limits from the CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"."""

    threads: int
    blocks: int
    shared: int  # bytes; 1 KB per block is reserved for the system
    registers: int = 65536


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(2048, 32, 164 * 1024),
    "sm_86": Multiprocessor(1536, 16, 100 * 1024),
    "sm_89": Multiprocessor(1536, 24, 100 * 1024),
    "sm_90": Multiprocessor(2048, 32, 228 * 1024),
    "sm_100": Multiprocessor(2048, 32, 228 * 1024),
    "sm_120": Multiprocessor(1536, 24, 100 * 1024),
}


@dataclass
class Launch:
    """Threads per block, and dynamic shared memory in bytes."""

    threads: int
    shared: int


NORMS = ("layer_norm_modulate", "norm_modulate_float8", "gated_residual_norm", "gated_residual_norm_float8")


def shared_of_meter(threads: int, vectors: int) -> int:
    """shared_layout() of csrc/cuda/bodies/block.h for one stride, with history."""
    warps = threads // 32
    return threads * vectors * 16 + 2 * threads * 4 + warps * 9 * 8 + warps * 16


def launch_of(kernel: str) -> Launch:
    """The launch in csrc/cuda. Kernels with one token per block: as for a channel count that needs 160
    threads."""
    name, _, options = kernel.partition("<")
    vectors = re.search(r"(\d+)>$", options)
    if name == "decide":
        return Launch(32, 0)
    if name == "video_sums":
        return Launch(256, 64)
    if name in NORMS:
        return Launch(160, 80)
    if name in ("gated_residual_norm_meter", "float8_meter"):
        return Launch(160, shared_of_meter(160, int(vectors.group(1)) if vectors else 0))
    if name == "meter":
        return Launch(256, shared_of_meter(256, 1))
    return Launch(256, 0)


@dataclass
class Usage:
    """The resources of one kernel on one architecture; in bytes, except for registers and counts."""

    kernel: str
    architecture: str
    registers: int = 0
    shared: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    instructions: int = 0  # this and the next two: in the hot code, see sass.py
    narrow_loads: int = 0
    narrow_stores: int = 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--build", type=Path, help="the build folder of CMake; default: the newest in build/")
    parser.add_argument("--json", type=Path, help="also write the report to this file as JSON")
    arguments = parser.parse_args()

    folder = arguments.build or newest_build()
    objects, nvcc = cuda_objects(folder)
    reports = [Path(f"{file}.ptxas.txt") for file in objects]
    usages = [usage for report in reports for usage in parse(report.read_text())]
    if not usages:
        raise SystemExit(f"{folder}: no kernels found; build the CUDA library with ADACACHE_CUDA=1")
    add_hot_code(usages, objects, nvcc)
    names = demangle(sorted({u.kernel for u in usages}))
    for usage in usages:
        usage.kernel = names[usage.kernel]
    architectures = sorted({u.architecture for u in usages}, key=lambda a: (len(a), a))
    print_table(usages, architectures)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps([figures(u) for u in usages], indent=1) + "\n")

    faults = find_faults(usages, architectures, json.loads(BUDGETS.read_text()))
    for fault in faults:
        print(f"FAULT {fault}")
    kernels = len({u.kernel for u in usages})
    most = max(usages, key=lambda u: u.registers)
    verdict = f"{len(faults)} faults" if faults else "no spills, all within the budgets"
    print(f"{kernels} kernels from {len(reports)} files for {', '.join(architectures)}: {verdict}")
    print(f"most registers: {most.registers} ({most.kernel}, {most.architecture})")
    return 1 if faults else 0


def blocks_per_multiprocessor(usage: Usage, launch: Launch) -> int:
    """The limit by registers (allocated per warp in units of 256, from four partitions), shared memory,
    threads and blocks."""
    has = MULTIPROCESSORS[usage.architecture]
    warps = -(-launch.threads // 32)
    registers_of_warp = -(-usage.registers * 32 // 256) * 256
    shared = -(-(usage.shared + launch.shared + 1024) // 128) * 128
    return min(
        has.registers // 4 // max(registers_of_warp, 1) * 4 // warps,
        has.shared // shared,
        has.threads // (32 * warps),
        has.blocks,
    )


def figures(usage: Usage) -> dict[str, Any]:
    """The JSON record of a kernel. occupancy: resident threads / maximum threads per multiprocessor."""
    launch = launch_of(usage.kernel)
    result: dict[str, Any] = {
        "kernel": usage.kernel,
        "arch": usage.architecture,
        "registers": usage.registers,
        "static_shared": usage.shared,
        "dynamic_shared": launch.shared,
        "spills": usage.spill_stores + usage.spill_loads,
        "stack": usage.stack,
        "instructions": usage.instructions,
        "narrow_loads": usage.narrow_loads,
        "narrow_stores": usage.narrow_stores,
        "threads": launch.threads,
        "blocks": None,
        "occupancy": None,
    }
    if has := MULTIPROCESSORS.get(usage.architecture):
        result["blocks"] = blocks_per_multiprocessor(usage, launch)
        result["occupancy"] = round(result["blocks"] * launch.threads / has.threads, 3)
    return result


def newest_build() -> Path:
    folders = sorted((ROOT / "build").glob("cmake-*/compile_commands.json"), key=lambda p: p.stat().st_mtime)
    if not folders:
        raise SystemExit("no build found; run: python setup.py build_ext --inplace")
    return folders[-1].parent


def cuda_objects(folder: Path) -> tuple[list[Path], str | None]:
    """The object files of the CUDA library, whose ptxas reports must exist, and the path of nvcc."""
    commands = json.loads((folder / "compile_commands.json").read_text())
    objects, nvcc = [], None
    for entry in commands:
        if entry["file"].endswith(".cu"):
            # Some CMake versions omit "output"; the command always contains it.
            output = entry.get("output") or re.findall(r" -o (\S+)", entry["command"])[-1]
            if not (folder / f"{output}.ptxas.txt").exists():
                raise SystemExit(f"{folder / output}: no ptxas report; {entry['file']} is not compiled")
            objects.append(folder / output)
            nvcc = next((word for word in entry["command"].split() if Path(word).name == "nvcc"), nvcc)
    return objects, nvcc


def add_hot_code(usages: list[Usage], objects: list[Path], nvcc: str | None) -> None:
    try:
        tool = sass.disassembler(nvcc)
    except FileNotFoundError as error:
        raise SystemExit(f"kernel-report: {error}") from None
    by_kernel = {(u.kernel, u.architecture): u for u in usages}
    for hot in sass.hot_code(objects, tool):
        usage = by_kernel.pop((hot.kernel, hot.architecture))
        usage.instructions = hot.instructions
        usage.narrow_loads, usage.narrow_stores = hot.narrow_loads, hot.narrow_stores
    if by_kernel:
        raise SystemExit(f"kernel-report: {tool} shows no code of {', '.join(map(str, by_kernel))}")


def parse(text: str) -> list[Usage]:
    usages: list[Usage] = []
    current: Usage | None = None
    owner = ""  # the function of the following properties; may be a device function that was not inlined
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            current = Usage(match.group(1), match.group(2))
            usages.append(current)
        elif match := re.search(r"Function properties for (\S+)", line):
            owner = match.group(1)
        elif current is None:
            continue
        elif match := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            stack, stores, loads = (int(n) for n in match.groups())
            if owner == current.kernel:
                current.stack = stack
            current.spill_stores += stores
            current.spill_loads += loads
        elif match := re.search(r"Used (\d+) registers", line):
            current.registers = int(match.group(1))
            if shared := re.search(r"(\d+) bytes smem", line):
                current.shared = int(shared.group(1))
    return usages


def demangle(mangled: list[str]) -> dict[str, str]:
    """Readable names: no return type, no parameters, no namespaces, short dtypes."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None:
        return {name: name for name in mangled}
    text = subprocess.run([tool], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
    return dict(zip(mangled, map(shorten, text.splitlines()), strict=True))


def shorten(name: str) -> str:
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    depth = 0
    for place, letter in enumerate(name):  # the parameter list starts at the first parenthesis outside <>
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            name = name[:place]
            break
    name = re.sub(r"\b(?:\w+::)+(?=\w)", "", name)
    for long, short in SHORT_DTYPES.items():
        name = re.sub(rf"\b{long}\b", short, name)
    return re.sub(r"\((?:unsigned )?(?:int|long|bool|char|short)\)", "", name).replace("> >", ">>")


def print_table(usages: list[Usage], architectures: list[str]) -> None:
    cells: dict[str, dict[str, str]] = {}
    for u in usages:
        f = figures(u)
        share = "" if f["occupancy"] is None else f" / {f['blocks']} = {100 * f['occupancy']:.0f} %"
        stack = f" +{u.stack}" if u.stack else ""
        cell = f"{u.registers} / {u.shared} / {f['spills']}{stack}{share}"
        cells.setdefault(u.kernel, {})[u.architecture] = cell
    print("registers / static shared memory in bytes / spilled bytes (+ stack frame in bytes, if any)")
    print("/ blocks per multiprocessor = occupancy")
    print_cells(cells, architectures)
    hot: dict[str, dict[str, str]] = {}
    for u in usages:
        cell = f"{u.instructions} / {u.narrow_loads} / {u.narrow_stores}"
        hot.setdefault(u.kernel, {})[u.architecture] = cell
    print("\nhot code: instructions / loads narrower than 16 bytes / stores narrower than 16 bytes")
    print_cells(hot, architectures)


def print_cells(cells: dict[str, dict[str, str]], architectures: list[str]) -> None:
    width = max(len(kernel) for kernel in cells)
    columns = {a: max(len(a), *(len(row.get(a, "-")) for row in cells.values())) for a in architectures}
    print("kernel".ljust(width), *(a.rjust(columns[a]) for a in architectures), sep="  ")
    for kernel, row in sorted(cells.items()):
        print(kernel.ljust(width), *(row.get(a, "-").rjust(columns[a]) for a in architectures), sep="  ")


def find_faults(
    usages: list[Usage], architectures: list[str], budgets: dict[str, dict[str, int | None]]
) -> list[str]:
    faults = []
    seen: dict[str, set[str]] = {}
    used: dict[str, set[str]] = {quantity: {"*"} for quantity in budgets}
    for u in usages:
        seen.setdefault(u.kernel, set()).add(u.architecture)
        if u.spill_stores or u.spill_loads:
            faults.append(f"{u.kernel}, {u.architecture}: spills {u.spill_stores} + {u.spill_loads} bytes")
        names = (u.kernel, f"{u.kernel}, {u.architecture}")
        for quantity, granted in budgets.items():
            pattern = max((p for p in granted if any(fnmatchcase(n, p) for n in names)), key=len)
            used[quantity].add(pattern)
            uses, budget = getattr(u, quantity), granted[pattern]
            if budget is not None and uses > budget:
                what = quantity.replace("_", " ")
                faults.append(f"{u.kernel}, {u.architecture}: {uses} {what}, budget {budget}")
    for kernel, has in seen.items():
        if lacks := [a for a in architectures if a not in has]:
            faults.append(f"{kernel}: not compiled for {', '.join(lacks)}")
    for quantity, granted in budgets.items():
        for pattern in sorted(set(granted) - used[quantity]):
            faults.append(f"{BUDGETS.name}, {quantity}: {pattern} matches no kernel")
    return faults


if __name__ == "__main__":
    sys.exit(main())

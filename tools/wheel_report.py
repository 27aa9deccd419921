"""Prints the size of a wheel, its build info, and the undefined symbols of its shared libraries.

Fails if an op library has an undefined symbol of ATen, c10 or Python, whose ABI is not stable.
Usage: python tools/wheel_report.py WHEEL [--symbols]
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from pathlib import Path

# The first match sets the group. Mangled C++ names match by namespace: at::, c10::, torch::.
GROUPS = (
    ("ATen", re.compile(r"^_Z\w*?2at\d|\bat::")),
    ("c10", re.compile(r"^_Z\w*?3c10\d|\bc10::")),
    ("torch C++", re.compile(r"^_Z\w*?5torch\d|\btorch::")),
    ("Python", re.compile(r"^_?Py[A-Z_]")),
    ("LibTorch stable C ABI", re.compile(r"^(aoti_torch|torch)_")),
    ("CUDA driver and runtime", re.compile(r"^(cu|cuda|__cuda)[A-Z]")),
    ("C++ runtime", re.compile(r"@(GLIBCXX|CXXABI|GCC)_|^_Z")),
    ("C library", re.compile(r"@GLIBC_|^__tls_get_addr")),
    ("optional hooks", re.compile(r"^(_ITM_|__gmon_start__|__cxa_finalize)")),
)
FORBIDDEN_IN_OPS = ("ATen", "c10", "torch C++", "Python", "other")
LISTED = (*FORBIDDEN_IN_OPS, "LibTorch stable C ABI", "CUDA driver and runtime")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--symbols", action="store_true", help="list all symbols, not only those of torch")
    arguments = parser.parse_args()

    faults = []
    with zipfile.ZipFile(arguments.wheel) as wheel, tempfile.TemporaryDirectory() as folder:
        print(f"{arguments.wheel.name}: {mebibytes(arguments.wheel.stat().st_size)}")
        info = json.loads(wheel.read("adacache_kernels/_build_info.json"))
        cuda = info["cuda"]
        architectures = ", ".join("sm_" + a for a in cuda["architectures"])
        print(f"built with torch {info['torch']} and {info['compiler']} for torch >= {info['torch_target']}")
        print(
            f"CUDA: nvcc {cuda['nvcc']} for {architectures}"
            if cuda["built"]
            else f"CUDA: not built, {cuda['reason']}"
        )
        for entry in sorted(wheel.infolist(), key=lambda e: -e.file_size):
            if entry.file_size > 100_000 or entry.filename.endswith(".so"):
                sizes = f"{mebibytes(entry.file_size)}, compressed {mebibytes(entry.compress_size)}"
                print(f"  {entry.filename}: {sizes}")
        for name in (n for n in wheel.namelist() if n.endswith(".so")):
            faults += report_library(name, Path(wheel.extract(name, folder)), arguments.symbols)
    for fault in faults:
        print(f"FAULT {fault}")
    if not faults:
        print("the op libraries have no undefined symbols of ATen, c10 or Python")
    return 1 if faults else 0


def report_library(name: str, path: Path, every: bool) -> list[str]:
    symbols = undefined_symbols(path)
    groups: dict[str, list[str]] = {}
    for symbol in symbols:
        group = next((g for g, pattern in GROUPS if pattern.search(symbol)), "other")
        groups.setdefault(group, []).append(symbol)
    print(f"\n{name}: {len(symbols)} undefined symbols; needs {', '.join(needed_libraries(path))}")
    for group, members in groups.items():
        newest = newest_versions(members)
        print(f"  {group}: {len(members)}" + (f" (newest {newest})" if newest else ""))
        if every or ("_ops_" in name and group in LISTED):
            print(textwrap.indent(textwrap.fill(" ".join(members), 106, break_on_hyphens=False), "    "))
    if "_ops_" not in name:  # the engine is a Python module; it must not use torch
        forbidden: tuple[str, ...] = ("ATen", "c10", "torch C++", "LibTorch stable C ABI")
    else:
        forbidden = FORBIDDEN_IN_OPS
    return [
        f"{name}: undefined {symbol} ({group})" for group in forbidden for symbol in groups.get(group, [])
    ]


def undefined_symbols(path: Path) -> list[str]:
    text = subprocess.run(
        ["nm", "-D", "--undefined-only", str(path)], capture_output=True, text=True, check=True
    ).stdout
    return sorted({line.split()[-1] for line in text.splitlines() if line.strip()})


def needed_libraries(path: Path) -> list[str]:
    text = subprocess.run(["readelf", "-d", str(path)], capture_output=True, text=True, check=True).stdout
    return re.findall(r"\(NEEDED\).*\[(.+)\]", text)


def newest_versions(symbols: list[str]) -> str:
    """The newest required version of each versioned runtime library."""
    newest: dict[str, tuple[int, ...]] = {}
    for symbol in symbols:
        if match := re.search(r"@(GLIBCXX|CXXABI|GLIBC|GCC)_([\d.]+)$", symbol):
            version = tuple(map(int, match.group(2).split(".")))
            newest[match.group(1)] = max(version, newest.get(match.group(1), ()))
    return ", ".join(f"{name} {'.'.join(map(str, version))}" for name, version in sorted(newest.items()))


def mebibytes(size: int) -> str:
    return f"{size / 2**20:.2f} MiB"


if __name__ == "__main__":
    sys.exit(main())

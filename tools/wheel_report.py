# SPDX-License-Identifier: Apache-2.0
"""Checks a wheel, and prints its size, its build info, and what its shared libraries need.

A fault is: an op library with an undefined symbol of ATen, c10 or Python, whose ABI is not stable; a tag that
package indexes refuse, or a newer glibc than the tag states; a library search path; a library without full
RELRO, without stack protector, or with an executable stack; no use of FORTIFY; a path of the machine that
built it; a wheel that is too large.
Usage: python tools/wheel_report.py WHEEL [--symbols] [--local] [--largest MIB]
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

ROOT = Path(__file__).resolve().parent.parent

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
#: Tags that indexes accept, with the newest glibc that they allow.
TAG = re.compile(r"manylinux_(\d+)_(\d+)_\w+$")
#: Paths of a machine that builds. Paths of a system, such as /usr/lib, are not among them.
BUILD_PATHS = re.compile(rb"(?<![\w./-])/(?:home|root|build|project|Users|github)/[\w.+/-]+")
LARGEST = 100  # MiB; the limit of PyPI for a file
FORBIDDEN_IN_OPS = ("ATen", "c10", "torch C++", "Python", "other")
LISTED = (*FORBIDDEN_IN_OPS, "LibTorch stable C ABI", "CUDA driver and runtime")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--symbols", action="store_true", help="list all symbols, not only those of torch")
    parser.add_argument("--local", action="store_true", help="a wheel for this machine: any tag is accepted")
    parser.add_argument("--largest", type=float, default=LARGEST, help="MiB (default: %(default)s)")
    arguments = parser.parse_args()

    faults = [] if arguments.local else tag_faults(arguments.wheel.name)
    if arguments.wheel.stat().st_size > arguments.largest * 2**20:
        faults.append(f"{mebibytes(arguments.wheel.stat().st_size)}, more than {arguments.largest:g} MiB")
    limit = None if arguments.local else glibc_of_tag(arguments.wheel.name)
    fortified = []
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
            path = Path(wheel.extract(name, folder))
            faults += report_library(name, path, arguments.symbols)
            faults += glibc_faults(name, undefined_symbols(path), limit)
            faults += hardening_faults(name, path)
            faults += path_faults(name, path.read_bytes())
            fortified += [s for s in undefined_symbols(path) if re.search(r"_chk@GLIBC", s)]
    if not any("__stack_chk_fail" not in symbol for symbol in fortified):
        faults.append("no library calls a checked function of FORTIFY (such as __memcpy_chk)")
    for fault in faults:
        print(f"FAULT {fault}")
    if not faults:
        print("no faults")
    return 1 if faults else 0


def tag_faults(name: str) -> list[str]:
    """Faults of the platform tag in the name of a wheel."""
    platforms = Path(name).stem.split("-")[-1].split(".")
    refused = [tag for tag in platforms if not TAG.match(tag)]
    return [f"tag {tag}: indexes accept manylinux_X_Y only; run `make wheels`" for tag in refused]


def glibc_of_tag(name: str) -> tuple[int, int] | None:
    """The newest glibc that all platform tags in the name of a wheel allow; None without such a tag."""
    tags = [TAG.match(tag) for tag in Path(name).stem.split("-")[-1].split(".")]
    versions = [(int(tag[1]), int(tag[2])) for tag in tags if tag]
    return min(versions, default=None)


def glibc_faults(name: str, symbols: list[str], limit: tuple[int, int] | None) -> list[str]:
    """Symbols of a newer glibc than the limit."""
    faults = []
    for symbol in symbols:
        match = re.search(r"@GLIBC_(\d+)\.(\d+)", symbol)
        if limit and match and (int(match[1]), int(match[2])) > limit:
            faults.append(f"{name}: {symbol} needs a newer glibc than the tag states ({limit[0]}.{limit[1]})")
    return faults


def hardening_faults(name: str, path: Path) -> list[str]:
    """Faults of the dynamic section and the segments of a library."""

    def readelf(option: str) -> str:
        command = ["readelf", option, "-W", str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    dynamic, segments = readelf("-d"), readelf("-l")
    faults = [
        f"{name}: {kind} {value}" for kind, value in re.findall(r"\((RPATH|RUNPATH)\).*\[(.*)\]", dynamic)
    ]
    if "GNU_RELRO" not in segments:
        faults.append(f"{name}: no RELRO")
    if not re.search(r"\(FLAGS\).*BIND_NOW|\(FLAGS_1\).*NOW|\(BIND_NOW\)", dynamic):
        faults.append(f"{name}: RELRO is partial: symbols are bound lazily")
    if re.search(r"GNU_STACK.*RWE", segments) or "GNU_STACK" not in segments:
        faults.append(f"{name}: the stack is executable")
    if not any("__stack_chk_fail" in symbol for symbol in undefined_symbols(path)):
        faults.append(f"{name}: no stack protector")
    return faults


def path_faults(name: str, content: bytes) -> list[str]:
    """Paths of this machine in a library."""
    own = {str(ROOT), sys.prefix, str(Path.home())} - {"/", "/usr"}
    found = {match.decode() for match in BUILD_PATHS.findall(content)}
    found |= {path for path in own if path.encode() in content}
    return [f"{name}: contains the path {path}" for path in sorted(found)]


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

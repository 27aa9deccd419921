# SPDX-License-Identifier: Apache-2.0
"""The SPDX line that names the licence, at the top of every source file. Fails if one lacks it.

python tools/spdx.py [--fix]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LICENCE = "SPDX-License-Identifier: Apache-2.0"
COMMENTS = {
    "#": (".py", ".pyi", ".sh", ".mk", ".cmake", "CMakeLists.txt", "Makefile", ".ci/run"),
    "//": (".h", ".cpp", ".cu", ".cuh"),
}
FOLDERS = ("adacache_kernels", "python", "csrc", "tests", "tools", "benchmarks", "examples", ".ci")
FILES = ("setup.py", "CMakeLists.txt", "Makefile")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fix", action="store_true", help="add the line where it is missing")
    arguments = parser.parse_args()
    missing = [path for path in sources() if line_of(path) not in path.read_text().splitlines()[:2]]
    for path in missing:
        if arguments.fix:
            add(path)
        print(f"{'added to' if arguments.fix else 'no SPDX line in'} {path.relative_to(ROOT)}")
    return 1 if missing and not arguments.fix else 0


def sources() -> list[Path]:
    """The source files, without empty ones and those that the build makes."""
    found = [ROOT / name for name in FILES]
    for folder in FOLDERS:
        found += sorted(path for path in (ROOT / folder).rglob("*") if path.is_file())
    return [p for p in found if comment(p) and "__pycache__" not in p.parts and p.stat().st_size]


def comment(path: Path) -> str:
    """How a line comment begins; "" for other files."""
    name = path.relative_to(ROOT).as_posix()
    return next((sign for sign, ends in COMMENTS.items() if name.endswith(ends)), "")


def line_of(path: Path) -> str:
    return f"{comment(path)} {LICENCE}"


def add(path: Path) -> None:
    """Adds the line: the first, or the second after `#!`."""
    first, _, rest = path.read_text().partition("\n")
    line = line_of(path)
    path.write_text(f"{first}\n{line}\n{rest}" if first.startswith("#!") else f"{line}\n{first}\n{rest}")


if __name__ == "__main__":
    sys.exit(main())

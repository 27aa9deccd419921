# SPDX-License-Identifier: Apache-2.0
"""Layers of `python/adacache`: imports go downwards only, without cycles; each module imports alone."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "python" / "adacache"
LAYERS = [
    "adacache.__main__",
    "adacache.commands",
    "adacache.digits",
    "adacache.calibration",
    "adacache.serving",
    "adacache",
    "adacache.plugins",
    "adacache.api",
    "adacache.integrations",
    "adacache.handle",
    "adacache.runtime",
    "adacache.adapters",
    "adacache.fused",
    "adacache.policies",
    "adacache.trace",
    "adacache.models",
]
"""From the highest layer to the lowest. Other top-level modules form the lowest layer."""


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(module: str, source: str) -> set[str]:
    """Modules of the package that a module imports, also in functions and under TYPE_CHECKING."""
    package = module if SOURCES[module].name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) + 1 - node.level], *([base] if base else [])])
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                found.add(submodule if submodule in SOURCES else base)
    return {name for name in found if name in SOURCES} - {module}


def layer(module: str) -> int:
    """Index in LAYERS; modules that are not listed come last."""
    name = ".".join(module.split(".")[:2])
    return LAYERS.index(name) if name in LAYERS else len(LAYERS)


def upward(module: str, names: set[str]) -> list[str]:
    return [f"{module} imports {name}" for name in sorted(names) if layer(name) < layer(module)]


GRAPH = {module: imported(module, path.read_text()) for module, path in SOURCES.items()}


def test_imports_go_downwards() -> None:
    assert [one for module, names in GRAPH.items() for one in upward(module, names)] == []


def test_there_are_no_cycles() -> None:
    order = list(graphlib.TopologicalSorter(GRAPH).static_order())
    assert set(order) == set(SOURCES)


@pytest.mark.parametrize(
    "source",
    [
        "import adacache.handle",
        "def run():\n    from adacache.handle import Handle",
        "from adacache import handle",
        "from ..handle import Handle",
        "from .. import handle",
        "from adacache import Handle",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from adacache.handle import Handle",
    ],
)
def test_every_form_of_import_is_found(source: str) -> None:
    assert upward("adacache.runtime.store", imported("adacache.runtime.store", source))


def test_layers_exist() -> None:
    assert set(LAYERS) <= set(SOURCES)


def test_the_kernels_do_not_import_the_layer() -> None:
    paths = sorted((ROOT / "adacache_kernels").rglob("*.py"))
    assert len(paths) > 10
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] == "adacache"], path


IMPORT_EACH_ALONE = """
import importlib, sys
import adacache
for name in sys.argv[1:]:
    for loaded in [one for one in sys.modules if one.split(".")[0] == "adacache"]:
        del sys.modules[loaded]
    # Skip adacache/__init__.py: its imports could hide a cycle.
    bare = sys.modules["adacache"] = type(sys)("adacache")
    bare.__path__ = adacache.__path__
    importlib.import_module(name)
"""


def test_each_module_imports_alone() -> None:
    names = [name for name in SOURCES if name not in ("adacache", "adacache.__main__")]
    subprocess.run(
        [sys.executable, "-c", IMPORT_EACH_ALONE, *names],
        check=True,
        timeout=250,
        env={"PYTHONPATH": f"{ROOT}:{PACKAGE.parent}", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
    )

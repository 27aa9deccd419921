"""Imports inside `adacache` go down the layers only, and never in a circle."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

from tool_loading import ROOT

LAYERS = (
    ("commands",),
    ("digits",),
    ("calibration",),
    ("api",),
    ("integrations",),
    ("handle",),
    ("runtime",),
    ("adapters",),
    ("fused",),
    ("policies",),
    ("trace", "models", "interpose", "plots", "rows", "sites", "files", "checks"),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def imports(package: Path) -> dict[str, set[str]]:
    """The modules of a package and what each imports of it, also in functions and under TYPE_CHECKING."""
    found: dict[str, set[str]] = {}
    for file in package.rglob("*.py"):
        parts = file.relative_to(package.parent).with_suffix("").parts
        name = ".".join(parts).removesuffix(".__init__")
        found[name] = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}: relative import"
                found[name] |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name: {other for other in others if other in found} for name, others in found.items()}


def layer(module: str) -> str:
    return module.split(".")[1]


def test_imports_go_down_the_layers() -> None:
    found = imports(ROOT / "python" / "adacache")
    assert len(found) > 50
    assert {layer(name) for name in found if "." in name} - {"__main__"} <= set(RANK)
    upward = [
        f"{name} -> {other}"
        for name, others in found.items()
        for other in others
        if name not in ("adacache", "adacache.__main__")
        and (other == "adacache" or RANK[layer(name)] > RANK[layer(other)])
    ]
    assert upward == []


def test_no_import_cycles() -> None:
    found = imports(ROOT / "python" / "adacache")
    tuple(TopologicalSorter(found).static_order())  # raises CycleError


def test_kernels_never_import_the_layer() -> None:
    files = list((ROOT / "adacache_kernels").rglob("*.py"))
    assert len(files) > 20
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module or ""]
            assert not any(module.partition(".")[0] == "adacache" for module in modules), file

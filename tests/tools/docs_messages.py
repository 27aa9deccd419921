# SPDX-License-Identifier: Apache-2.0
"""The messages of warnings and errors, as written in the source; "…" stands for a value."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (ROOT / "python" / "adacache", ROOT / "adacache_kernels")
PREFIX = "AdaCache: "
"""`Handle.warn` adds it."""


def text_of(node: ast.expr) -> str:
    """A string expression with "…" for each value in it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    return "…"


def _calls(tree: ast.AST) -> Iterator[tuple[ast.Call, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node, node.func.attr if isinstance(node.func, ast.Attribute) else ""


def warnings_of(source: str) -> list[str]:
    """Messages of `warnings.warn(message)` and of `handle.warn(key, message)`."""
    found = []
    for call, name in _calls(ast.parse(source)):
        if name != "warn":
            continue
        assert isinstance(call.func, ast.Attribute)
        if isinstance(call.func.value, ast.Name) and call.func.value.id == "warnings":
            message = text_of(call.args[0])
        else:
            message = PREFIX + text_of(call.args[1])
        if message.strip("… ") != PREFIX.strip():  # `Handle.warn` itself
            found.append(message)
    return found


def warning_keys_of(source: str) -> list[str]:
    """Keys of `handle.warn(key, message)`, which warns once per key."""
    calls = [call for call, name in _calls(ast.parse(source)) if name == "warn" and len(call.args) == 2]
    return [call.args[0].value for call in calls if isinstance(call.args[0], ast.Constant)]


def errors_of(source: str, kind: str) -> list[str]:
    """Messages of `raise kind(message)`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            name = node.exc.func
            if isinstance(name, ast.Name) and name.id == kind:
                found.append(text_of(node.exc.args[0]))
    return found


def error_classes_of(source: str) -> list[str]:
    """Public classes that derive from an exception."""
    return [
        node.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ClassDef)
        and not node.name.startswith("_")
        and any(re.search(r"(Error|Exception|Warning)$", ast.unparse(base)) for base in node.bases)
    ]


def sources() -> list[str]:
    return [path.read_text() for package in PACKAGES for path in sorted(package.rglob("*.py"))]

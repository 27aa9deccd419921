# SPDX-License-Identifier: Apache-2.0
"""What code runs when a module is called: its class's own forward or another, known or unknown."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import textwrap
from typing import Any

import torch

_SKIPPED = {"annotation", "returns", "type_comment", "type_params", "kind", "ctx"}


def hooked(module: Any) -> str | None:
    """Why code other than the class's own forward runs when a module is called; None if it does not."""
    attributes = module.__dict__
    if "forward" in attributes:
        return "its forward is replaced"
    if attributes["_forward_hooks"] or attributes["_forward_pre_hooks"]:
        return "it has hooks"
    if torch.nn.modules.module._has_any_global_hook():
        return "hooks for all modules are set"
    return None


def fingerprint(function: Any) -> str:
    """A hash of the code of a function, without its name, comments, annotations and docstring; "" if its
    source is not at hand. Of a decorated function or a patch, it is that of the wrapper."""
    return _fingerprint(function)


@functools.lru_cache(maxsize=256)
def _fingerprint(function: Any) -> str:
    try:
        source = textwrap.dedent(inspect.getsource(function.__code__))
        tree: Any = ast.parse(source).body[0]
        parts = [tree.args, tree.body, tree.decorator_list]
    except (AttributeError, OSError, TypeError, SyntaxError):
        return ""
    return hashlib.sha256(repr(_canonical(parts)).encode()).hexdigest()[:16]


def _canonical(node: Any) -> Any:
    """A syntax tree as nested lists that are equal under all versions of Python."""
    if isinstance(node, list):
        return [_canonical(one) for one in node if not _is_text(one)]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [(name, value) for name, value in ast.iter_fields(node) if name not in _SKIPPED]
    return [
        type(node).__name__,
        *((name, _canonical(value)) for name, value in fields if value not in (None, [])),
    ]


def _is_text(node: Any) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )

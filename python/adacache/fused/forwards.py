# SPDX-License-Identifier: Apache-2.0
"""Which blocks a program can run: their forward must be the one that the program was written from."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import textwrap
from typing import Any

from adacache.fused.norms import hooked
from adacache.fused.program import BlockProgram
from adacache.interpose import plain_class

_SKIPPED = {"annotation", "returns", "type_comment", "type_params", "kind", "ctx"}


def refusal(program: BlockProgram, block: Any) -> str | None:
    """Why a block runs as the model's own code and not as a program; None: the program runs it."""
    if hasattr(block, "_orig_mod") or block.__dict__.get("_compiled_call_impl") is not None:
        return "it is compiled"
    reason = hooked(block)
    if reason is not None:
        return reason
    kind: Any = plain_class(block)
    if fingerprint(kind.forward) not in program.forwards:
        return "its class has an unknown forward"
    return program.refuses(block)


@functools.lru_cache(maxsize=256)
def fingerprint(function: Any) -> str:
    """A hash of the code of a function, without its name, comments, annotations and docstring; "" if its
    source is not at hand. Of a decorated function or a patch, it is that of the wrapper."""
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

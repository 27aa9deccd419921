# SPDX-License-Identifier: Apache-2.0
"""Invalid variants of JSON values: a reader accepts them or raises its documented error."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

VALUES = (
    None, True, False, -1, 0, 1, 2.7, 1e9, 10**400, 1 << 62, float("nan"), float("inf"), "", "x\x1b[31m",
    [], [[]], [None], {}, {"x": {}}, [[0.1, 2], [0.1, 2]], [1e308, "1"],
)  # fmt: skip


def variants(value: Any) -> Iterator[Any]:
    """Copies of a JSON value, each with one field replaced by one of `VALUES`."""
    for path in _paths(value):
        for hostile in VALUES:
            if not path:
                yield hostile
                continue
            changed = copy.deepcopy(value)
            parent = changed
            for key in path[:-1]:
                parent = parent[key]
            parent[path[-1]] = hostile
            yield changed


def _paths(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Paths to all values; for lists, to the first two items."""
    yield path
    items: Any = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        items = enumerate(value[:2])
    for key, inner in items:
        yield from _paths(inner, (*path, key))

# SPDX-License-Identifier: Apache-2.0
"""Checks of values that come from outside: arguments, command-line options, JSON.

A check takes a value and its name. It returns the value, or raises ValueError with what it expected.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any, NoReturn

Check = Callable[[Any, str], Any]

EXACT = 1 << 53
"""float64 represents integers up to here exactly."""

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxdict = 3, 8, 8, 8
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def refuse(name: str, expected: str, value: Any) -> NoReturn:
    """Raises ValueError with the name, what is accepted, and the value in short."""
    try:
        shown = _SHORT.repr(value)
    except ValueError:  # Python refuses to print integers of more than 4300 digits
        shown = f"a {type(value).__name__} that is too long to print"
    raise ValueError(f"{name}: expected {expected}, got {shown}")


def whole(least: int | None = None, most: int | None = None) -> Check:
    """An integer in least .. most, by default within +-2**53; no bool, no float."""
    expected = "a whole number" + _range(least, most)
    low = -EXACT if least is None else least
    high = EXACT if most is None else most

    def check(value: Any, name: str) -> int:
        if isinstance(value, bool) or not isinstance(value, Integral):
            refuse(name, expected, value)
        found = int(value)
        if not low <= found <= high:
            refuse(name, expected if abs(found) <= high else f"a whole number in {low}..{high}", value)
        return found

    return check


def number(least: float | None = None, most: float | None = None, above: float | None = None) -> Check:
    """A finite real number in least .. most and greater than `above`; no bool."""
    expected = "a number" + _range(least, most, above)

    def check(value: Any, name: str) -> Any:
        try:
            fits = not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)
        except OverflowError:  # an integer beyond the range of float64
            fits = False
        if not fits or not _within(value, least, most) or not (above is None or value > above):
            refuse(name, expected, value)
        return value

    return check


def flag(value: Any, name: str) -> bool:
    """A bool."""
    if not isinstance(value, bool):
        refuse(name, "true or false", value)
    return value


def text(*accepted: str) -> Check:
    """A string, one of `accepted` if there are any."""
    expected = f"one of {', '.join(accepted)}" if accepted else "text"

    def check(value: Any, name: str) -> str:
        if not isinstance(value, str) or (accepted and value not in accepted):
            refuse(name, expected, value)
        return value

    return check


def array(item: Check, least: int = 0, most: int | None = None) -> Check:
    """A list of least .. most items that pass a check."""
    count = f"{least}" if least == most else f"{least} or more" if most is None else f"{least}..{most}"
    expected = f"a list of {count} items" if least or most is not None else "a list"

    def check(value: Any, name: str) -> list[Any]:
        if not isinstance(value, list) or not _within(len(value), least, most):
            refuse(name, expected, value)
        return [item(entry, f"{name}[{i}]") for i, entry in enumerate(value)]

    return check


def optional(inner: Check) -> Check:
    """None (null in JSON), or what passes a check."""
    return lambda value, name: None if value is None else inner(value, name)


def anything(value: Any, name: str) -> Any:
    """Any value."""
    return value


def fields(
    required: Mapping[str, Check],
    extra: Mapping[str, Check] | None = None,
    others: Check | None = None,
) -> Check:
    """A dict with all `required` keys, perhaps some of `extra`, and other keys only if `others` is given."""
    known = {**required, **(extra or {})}

    def check(value: Any, name: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            refuse(name, "an object", value)
        for key in required:
            if key not in value:
                raise ValueError(f"{_join(name, key)}: missing")
        for key in value:
            if key not in known and others is None:
                refuse(name, f"no other keys than {', '.join(known)}", key)
        return {
            key: known.get(key, others or anything)(entry, _join(name, key)) for key, entry in value.items()
        }

    return check


def printable(text: str) -> str:
    """Text with control characters escaped, so that it cannot steer a terminal; newlines stay."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape", "surrogatepass").decode()
        for c in text
    )


def _join(name: str, key: str) -> str:
    key = key if len(key) <= 80 else key[:77] + "..."
    return f"{name}.{key}" if name else key


def _within(value: Any, least: float | None, most: float | None) -> bool:
    return (least is None or value >= least) and (most is None or value <= most)


def _range(least: float | None, most: float | None, above: float | None = None) -> str:
    if above is not None:
        return f" above {above}" + ("" if most is None else f" and at most {most}")
    if least is not None and most is not None:
        return f" in {least}..{most}"
    if least is not None:
        return f" of at least {least}"
    return "" if most is None else f" of at most {most}"

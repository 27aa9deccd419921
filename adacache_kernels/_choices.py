# SPDX-License-Identifier: Apache-2.0
"""Arguments that select one of several named variants, with their numbers in the schemas."""

from __future__ import annotations

from collections.abc import Mapping

#: Where x + gate*y is rounded to the dtype of x: after the product and after the sum, or only after the sum.
ROUNDINGS = {"eager": 0, "float32": 1}

#: The kinds of norm.
NORMS = {"layer": 0, "rms": 1}


def rounding_number(rounding: str) -> int:
    return _number("rounding", ROUNDINGS, rounding)


def norm_number(norm: str) -> int:
    return _number("norm", NORMS, norm)


def _number(name: str, choices: Mapping[str, int], value: str) -> int:
    try:
        return choices[value]
    except (KeyError, TypeError):
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}") from None

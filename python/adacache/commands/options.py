# SPDX-License-Identifier: Apache-2.0
"""Types of command-line options: text becomes a checked value before any work starts."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from adacache.checks import Check, anything, fields, number, refuse, whole
from adacache.files import check_writable, parse_json

Option = Callable[[str], Any]


def whole_number(least: int | None = None, most: int | None = None) -> Option:
    """An integer."""
    return _option(int, whole(least, most))


def real_number(least: float | None = None, most: float | None = None, above: float | None = None) -> Option:
    """A finite number."""
    return _option(float, number(least, most, above))


def json_object(text: str) -> dict[str, Any]:
    """A JSON object."""
    values: dict[str, Any] = _option(parse_json, fields({}, others=anything))(text)
    return values


def device(text: str) -> str:
    """A torch device of this machine that holds data."""
    import torch

    try:
        torch.zeros(1, device=text).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        _fail("a device of this machine, such as cpu or cuda:0", text)
    return text


def output_file(text: str) -> Path:
    """A file that can be written."""
    try:
        check_writable(text, "path")
    except OSError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("path: ")) from error
    return Path(text)


def input_file(text: str) -> Path:
    """A file that exists."""
    if not Path(text).exists() or Path(text).is_dir():
        _fail("an existing file", text)
    return Path(text)


def require_packages(command: str, needed: Mapping[str, str]) -> None:
    """Raises ImportError unless the modules can be imported; `needed` gives the package of each."""
    missing = []
    for module, package in needed.items():
        try:
            importlib.import_module(module)
        except ImportError:
            missing.append(package)
    if missing:
        raise ImportError(f"{command}: {', '.join(missing)} missing; pip install 'adacache-kernels[demo]'")


def _option(parse: Callable[[str], Any], check: Check) -> Option:
    def convert(text: str) -> Any:
        try:
            value = parse(text)
        except (ValueError, OverflowError):
            value = text
        try:
            return check(value, "")
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error).removeprefix(": ")) from error

    return convert


def _fail(expected: str, text: str) -> Any:
    try:
        refuse("", expected, text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix(": ")) from error

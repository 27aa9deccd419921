# SPDX-License-Identifier: Apache-2.0
"""Loads weights strictly from safetensors files, the only format that is read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

FLOATING = ("F64", "F32", "F16", "BF16")
"""Types that floating-point parameters are loaded from, as safetensors names them."""
_TYPE_NAMES = {"torch.int64": "I64", "torch.int32": "I32", "torch.bool": "BOOL", "torch.uint8": "U8"}


def check_safetensors(model: nn.Module, *files: str | Path) -> None:
    """Checks the keys, shapes and types that the files' headers state; reads no weights, so the model may be
    on the meta device.

    Raises:
        ValueError: a file is not a safetensors file, or keys are missing, repeated, unexpected, or of another
            shape or type.
        FileNotFoundError: a file does not exist.
    """
    found: dict[str, tuple[list[int], str]] = {}
    for file in files:
        with _opened(file) as tensors:
            for key in tensors.keys():  # noqa: SIM118 - a safetensors handle is not a mapping
                if key in found:
                    raise ValueError(f"weights: {key} is in two of the files {[str(f) for f in files]}")
                entry = tensors.get_slice(key)
                found[key] = (list(entry.get_shape()), str(entry.get_dtype()))
    expected = model.state_dict()
    problems = [f"missing {key}" for key in expected if key not in found]
    problems += [f"unexpected {key}" for key in found if key not in expected]
    for key, value in expected.items():
        if key not in found:
            continue
        shape, stored = found[key]
        types = FLOATING if value.is_floating_point() else (_TYPE_NAMES.get(str(value.dtype), ""),)
        if shape != list(value.shape):
            problems.append(f"{key}: expected {list(value.shape)}, got {shape}")
        elif stored not in types:
            problems.append(f"{key}: expected the type {' or '.join(types)}, got {stored}")
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ValueError(f"weights: {', '.join(str(f) for f in files)} do not fit the model: {shown}")


def load_safetensors(model: nn.Module, *files: str | Path) -> None:
    """Loads every parameter and buffer of `model`, strictly; nothing is changed if anything does not fit.

    Raises:
        ValueError, FileNotFoundError: as `check_safetensors`.
    """
    check_safetensors(model, *files)
    state: dict[str, Tensor] = {}
    for file in files:
        with _opened(file) as tensors:
            state |= {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
    model.load_state_dict(state)


@contextmanager
def _opened(file: str | Path) -> Iterator[Any]:
    if not Path(file).is_file():
        raise FileNotFoundError(f"weights: no file {file}")
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"weights: {file} is not a readable safetensors file ({error})") from error

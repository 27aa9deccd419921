# SPDX-License-Identifier: Apache-2.0
"""Files: JSON is read up to a size and checked; every file is written under another name and then renamed."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adacache.checks import Check, refuse

MEBIBYTE = 1 << 20


def read_text(path: str | Path, most: int = MEBIBYTE) -> str:
    """The text of a UTF-8 file of at most `most` bytes.

    Raises:
        ValueError: the file is larger, or is not UTF-8.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{path}: expected at most {most} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text ({error})") from error


def read_json(path: str | Path, check: Check, most: int = MEBIBYTE) -> Any:
    """The value in a JSON file of at most `most` bytes, checked.

    Raises:
        ValueError: the file is too large or not JSON, or a field is missing or wrong; names file and field.
        OSError: the file cannot be read.
    """
    text = read_text(path, most)
    try:
        return check(parse_json(text), "")
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).removeprefix(': ')}") from error


def parse_json(text: str) -> Any:
    """The value of JSON text.

    Raises:
        ValueError: the text is not JSON, is nested too deeply, or an object has a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("expected JSON, got lists or objects that are nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"expected JSON ({error})") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        refuse("keys", "each key once", next(name for name in names if names.count(name) > 1))
    return values


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Context manager: gives a temporary path in the same folder, which is renamed to `path` at the end.

    If the block raises, the temporary file is removed and `path` is unchanged. Links are followed; a device
    or a pipe is written directly.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        yield path
        return
    _require_access(path)
    temporary = _temporary(path)
    try:
        yield temporary
        if path.exists():
            shutil.copymode(path, temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes a UTF-8 file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, values: Any) -> None:
    """Writes a JSON file whole or not at all."""
    write_text(path, json.dumps(values, indent=1) + "\n")


def check_writable(path: str | Path, name: str) -> None:
    """Raises OSError unless a file can be written at `path`; `name` is that of the argument."""
    path = Path(os.path.realpath(path))
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        _require_access(path)
        if path.is_file() or not path.exists():
            temporary = _temporary(path)
            temporary.touch()
            temporary.unlink()
    except OSError as error:
        raise OSError(f"{name}: cannot write {path}: {error.strerror or error}") from error


def _temporary(path: Path) -> Path:
    # The suffix stays: it decides the format of a plot.
    return path.with_name(f".{path.stem[:100]}-{secrets.token_hex(6)}{path.suffix}")


def _require_access(path: Path) -> None:
    """Renaming would replace a read-only file."""
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

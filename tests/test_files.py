# SPDX-License-Identifier: Apache-2.0
"""Value checks; files: reads are limited in size, writes are atomic."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adacache import files
from adacache.checks import Check, anything, array, fields, flag, number, optional, printable, text, whole


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (whole(1, 9), [1, 9, np.int64(3)], [0, 10, True, 2.0, 2.7, "2", None, 10**5000, np.bool_(True)]),
        (whole(), [-5, 1 << 53], [1.0, 10**400, -(10**400)]),
        (whole(1, 1 << 63), [1 << 63], [1 << 64]),
        (number(0, 1), [0, 1, 0.5, np.float32(0.5)], [-0.1, 1.1, True, "1", None, float("nan"), 10**400]),
        (number(above=0), [1e-300], [0, float("inf"), -1]),
        (flag, [True, False], [0, 1, "true", None]),
        (text(), ["", "x"], [1, None, b"x"]),
        (text("a", "b"), ["a"], ["c", "", 1]),
        (array(whole(0), 1, 2), [[1], [1, 2]], [[], [1, 2, 3], (1,), "1", [1.5]]),
        (optional(whole(0)), [None, 3], [-1, 2.5]),
        (
            fields({"a": whole()}, {"b": flag}),
            [{"a": 1}, {"a": 1, "b": True}],
            [{}, {"a": 1, "c": 2}, [], None],
        ),
        (fields({"a": whole()}, others=anything), [{"a": 1, "c": []}], [{"a": True, "c": 1}]),
    ],
)
def test_checks(check: Check, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        assert check(value, "x") == value
    for value in bad:
        with pytest.raises(ValueError, match=r"^x(\.a|\[0\])?: (expected .*, got |missing)"):
            check(value, "x")


def test_errors_name_the_field_and_are_short() -> None:
    check = fields({"a": array(fields({"b": whole(0)}))})
    with pytest.raises(ValueError, match=r"^top.a\[1\].b: expected a whole number of at least 0, got -1$"):
        check({"a": [{"b": 1}, {"b": -1}]}, "top")
    with pytest.raises(ValueError, match="got ") as raised:
        whole()("x\x1b" * 10_000, "n")
    assert len(str(raised.value)) < 200
    assert "\x1b" not in str(raised.value)


def test_printable_text() -> None:
    assert printable("Größe\n日本") == "Größe\n日本"
    assert printable("a\x1b[31m\r\x00\u202e\udc80b") == r"a\x1b[31m\r\x00\u202e\udc80b"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"expected JSON \("),
        (b"{", r"expected JSON \("),
        (b"\xff\xfe", "expected UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": 1, "a": 2}', "keys: expected each key once, got 'a'"),
        (b'{"a": 1e999}', "a: expected a whole number"),
        (b'{"a": %s}' % (b"9" * 900), "a: expected a whole number in 0..9"),
        (b"[]", "expected an object, got"),
        (b" " * 1001, "expected at most 1000 bytes"),
    ],
)
def test_unreadable_json(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"file\.json: .*({message})"):
        files.read_json(path, fields({"a": whole(0, 9)}), 1000 if b"[" * 1000 not in content else 1 << 20)


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.json"
    files.write_json(path, {"old": 1})

    def full(file: Path, *_: Any, **__: Any) -> int:
        with open(file, "w") as out:
            out.write("ha")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_json(path, {"new": 2})
    assert json.loads(path.read_bytes()) == {"old": 1}
    assert os.listdir(tmp_path) == ["file.json"]


def test_mode_and_links_are_kept(tmp_path: Path) -> None:
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to(target)
    files.write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    files.write_text(os.devnull, "nothing")
    assert not Path(os.devnull).is_file()


def test_read_only_files_are_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.json"
    path.write_text("old")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root ignores permissions
    with pytest.raises(PermissionError):
        files.write_text(path, "new")
    with pytest.raises(OSError, match=r"--out: cannot write .*file\.json: Permission denied"):
        files.check_writable(path, "--out")
    assert path.read_text() == "old"


def test_check_before_the_work(tmp_path: Path) -> None:
    files.check_writable(tmp_path / "new.json", "--out")
    files.check_writable(os.devnull, "--out")
    assert os.listdir(tmp_path) == []
    for path in (tmp_path, tmp_path / "none" / "x.json", "/proc/x.json"):
        with pytest.raises(OSError, match=r"--out: cannot write "):
            files.check_writable(path, "--out")

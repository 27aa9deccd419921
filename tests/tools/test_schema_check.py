# SPDX-License-Identifier: Apache-2.0
"""A library that was built from other schemas is refused at import."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tool_loading import ROOT

from adacache_kernels import _libraries, _schemas

PACKAGE = ROOT / "adacache_kernels"
BUILT = sorted(PACKAGE.glob("_ops_*.so"))


def marked(digest: str) -> bytes:
    return b"\x7fELF" + bytes(5000) + (_schemas.MARKER + digest).encode() + bytes(300)


def test_equal_schemas_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "_ops_cpu.so").write_bytes(marked(_schemas.digest()))
    _libraries._check_schemas(tmp_path / "_ops_cpu.so")


@pytest.mark.parametrize("content", [marked("0" * 16), b"\x7fELF" + bytes(100)], ids=["other", "none"])
def test_other_schemas_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "_ops_cpu.so"
    path.write_bytes(content)
    with pytest.raises(
        ImportError, match=rf"^{re.escape(str(path))}: .*built from other sources.*make build"
    ):
        _libraries._check_schemas(path)


def test_digest_follows_names_and_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    digests = {_schemas.digest()}
    for name, schema in [("decide", "(Tensor sums) -> ()"), ("another", "() -> ()")]:
        monkeypatch.setitem(_schemas.SCHEMAS, name, schema)
        digests.add(_schemas.digest())
    assert len(digests) == 3


def test_header_has_schemas_and_digest() -> None:
    header = _schemas.header()
    assert all(f'"{name}{schema}"' in header for name, schema in _schemas.SCHEMAS.items())
    assert f'"{_schemas.MARKER}{_schemas.digest()}"' in header


@pytest.mark.parametrize("library", BUILT, ids=lambda path: path.name)
def test_built_libraries_have_the_digest_once(library: Path) -> None:
    found = re.findall(re.escape(_schemas.MARKER.encode()) + rb"([0-9a-f]{16})", library.read_bytes())
    assert found == [_schemas.digest().encode()]


def test_import_with_an_older_library_names_file_and_remedy(tmp_path: Path) -> None:
    library = PACKAGE / "_ops_cpu.so"
    if not library.exists():
        pytest.skip("the op libraries are not built in place")
    package = tmp_path / "adacache_kernels"
    package.mkdir()
    for path in [*PACKAGE.glob("*.py"), PACKAGE / "_build_info.json"]:
        (package / path.name).write_bytes(path.read_bytes())
    for folder in ("ops", "reference", "triton"):
        (package / folder).symlink_to(PACKAGE / folder)
    content = library.read_bytes().replace(_schemas.digest().encode(), b"0123456789abcdef")
    (package / library.name).write_bytes(content)
    environment = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", "import adacache_kernels"]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode != 0
    assert run.stderr.splitlines()[-1].startswith(
        f"ImportError: {package / library.name}: the library was built"
    )

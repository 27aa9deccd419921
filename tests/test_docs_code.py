# SPDX-License-Identifier: Apache-2.0
"""README and docs: Python blocks run; commands, options and files exist."""

from __future__ import annotations

import argparse
import ast
import re
import sys
import warnings
from pathlib import Path

import adacache.adapters
import pytest
import torch
from adacache.commands.cli import _parser

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES += [ROOT / "benchmarks" / "README.md", *sorted(ROOT.glob("examples/*/README.md"))]
PAGES += sorted(page for page in (ROOT / "docs").rglob("*.md") if page.name != "models_tests.md")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
ADAPTER = "# python/adacache/adapters/"
"""First line of a block that contains a file of this folder."""
RESULTS = "benchmarks/results/"
"""Written by `make gpu`."""


SKIPPED = re.compile(r"<!-- not executed: .{10,} -->\n```python\n.*?^```\n", re.M | re.S)
"""A Python block that does not run, with the reason."""


def blocks(page: Path, language: str) -> list[str]:
    return [text for name, text in BLOCK.findall(SKIPPED.sub("", page.read_text())) if name == language]


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=page_name)
def test_python_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The blocks of a page run in order and share one namespace."""
    code = blocks(page, "python")
    if any("diffusers" in block for block in code):
        pytest.importorskip("diffusers")
    folder = tmp_path / "adapters"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(adacache.adapters, "__path__", [*adacache.adapters.__path__, str(folder)])
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "docs"}
    monkeypatch.setitem(sys.modules, "docs", type(sys)("docs"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for block in code:
            if block.startswith(ADAPTER):
                path = folder / block.splitlines()[0].removeprefix(ADAPTER)
                path.write_text(block)
                monkeypatch.delitem(sys.modules, f"adacache.adapters.{path.stem}", raising=False)
            else:
                exec(compile(block, page_name(page), "exec"), names)
    if page.name == "README.md":
        printed = capsys.readouterr().out
        assert printed.startswith("[1, 2, ")
        assert "'next_step': " in printed


def shown_commands() -> list[tuple[str, str]]:
    """Lines of shell blocks and inline code, each with its page."""
    found = []
    for page in PAGES:
        text = page.read_text()
        shell = [block for language in ("", "sh", "bash") for block in blocks(page, language)]
        lines = [line for block in shell for line in block.splitlines()]
        lines += re.findall(r"`([^`\n]+)`", BLOCK.sub("", text))
        found += [(page_name(page), line.partition(" #")[0].strip()) for line in lines]
    return found


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    shown = [(page, line.split()[1:]) for page, line in shown_commands() if line.startswith("make ")]
    assert len(shown) > 10
    for page, words in shown:
        for word in words:
            if not re.fullmatch(r"[a-z-]+", word):
                break  # ARGS=..., PYTHON=...
            assert word in targets, f"{page}: make {word}"


def test_options_of_the_command_exist() -> None:
    subparsers = next(a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
    shown = []
    for page, line in shown_commands():
        line = line.removeprefix("python -m ")
        if re.match(r"adacache [a-z]", line):
            shown.append(line)
            command = line.split()[1]
            assert command in subparsers.choices, f"{page}: {line}"
            for option in re.findall(r"(?<=\s)--[\w-]+", line):
                known = subparsers.choices[command]._option_string_actions
                assert option in known, f"{page}: adacache {command} has no {option}"
    assert {line.split()[1] for line in shown} == set(subparsers.choices)


def test_scripts_and_their_options_exist() -> None:
    shown = []
    for page, line in shown_commands():
        match = re.match(r"python ((?:\w+/)*\w+\.py)\b(.*)", line)
        if match is None:
            continue
        script = ROOT / match[1]
        assert script.is_file(), f"{page}: {line}"
        shown.append(line)
        if script.name != "setup.py":  # its options are those of setuptools
            for option in re.findall(r"--[a-z-]+", match[2]):
                assert f'"{option}"' in script.read_text(), f"{page}: {match[1]} has no {option}"
    assert len(shown) > 3


def test_only_marked_blocks_are_skipped(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    ran, marked = "```python\nran = 1\n```\n", "```python\nleft = 1\n```\n"
    page.write_text(f"{ran}<!-- not executed: needs a file of yours -->\n{marked}{ran}")
    assert blocks(page, "python") == ["ran = 1\n"] * 2
    page.write_text(f"<!-- not executed: -->\n{marked}")
    assert blocks(page, "python") == ["left = 1\n"]
    skipped = sum(len(SKIPPED.findall(page.read_text())) for page in PAGES)
    assert skipped <= 8, "too many blocks are not executed"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_named_files_exist(page: Path) -> None:
    text = BLOCK.sub("", page.read_text())
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("http")]
    for link in links:
        assert (page.parent / link).exists(), link
    folders = "adacache_kernels|benchmarks|csrc|docs|examples|python|tests|tools"
    paths = re.findall(rf"`((?:{folders})/[\w./*-]*)`", text)
    for path in paths:
        assert path == RESULTS or list(ROOT.glob(path.rstrip("/"))), path


def test_functions_of_the_architecture_exist() -> None:
    """Each Class.method on the page exists if the class is part of the package."""
    classes: dict[str, set[str]] = {}
    for path in (ROOT / "python" / "adacache").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                classes[node.name] = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
    named = re.findall(r"\b([A-Z_]\w+)\.([a-z_]\w*)", (ROOT / "docs" / "architecture.md").read_text())
    shown = [(name, method) for name, method in named if name in classes]
    assert len(shown) > 15
    for name, method in shown:
        assert method in classes[name], f"docs/architecture.md: {name} has no {method}"

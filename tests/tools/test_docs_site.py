# SPDX-License-Identifier: Apache-2.0
"""The documentation site: each public name and each message has an entry; generated parts; links."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections import Counter
from pathlib import Path
from typing import Any

import adacache
import docs_messages as messages
import pytest
import yaml
from tool_loading import load

import adacache_kernels

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
MARKDOWN = sorted(DOCS.rglob("*.md"))


class _Loader(yaml.SafeLoader):
    """Reads the tags of mkdocs.yml for Python names as None."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def site() -> dict[str, Any]:
    return yaml.load((ROOT / "mkdocs.yml").read_text(), _Loader)


def pages_of(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    items = nav.values() if isinstance(nav, dict) else nav
    return [page for item in items for page in pages_of(item)]


def test_every_page_is_in_the_navigation_once() -> None:
    assert Counter(pages_of(site()["nav"])) == Counter(p.relative_to(DOCS).as_posix() for p in MARKDOWN)


@pytest.mark.parametrize("package", [adacache, adacache_kernels], ids=lambda package: package.__name__)
def test_every_public_name_has_one_entry(package: Any) -> None:
    name = package.__name__
    text = "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    listed = Counter(re.findall(rf"^::: {name}(?:\.ops\.\w+)?\.(\w+)$", text, re.M))
    assert set(package.__all__) - set(listed) == set()
    assert max(listed.values()) == 1
    for one in listed:
        assert hasattr(package, one) or importlib.util.find_spec(f"{name}.{one}"), f"{one} does not exist"


def test_entries_of_ops_are_functions_not_their_modules() -> None:
    """`adacache_kernels.gated_residual` is a function, and mkdocstrings finds the module of that name."""
    text = (DOCS / "reference" / "ops.md").read_text()
    for op in adacache_kernels.OPS:
        assert f"\n::: adacache_kernels.ops.{op}.{op}\n" in text


@pytest.mark.parametrize("package", [adacache, adacache_kernels], ids=lambda package: package.__name__)
def test_every_public_name_is_documented(package: Any) -> None:
    """Functions and classes have a docstring of their own; values have a comment `#:` or a string."""
    sources = "\n".join(messages.sources())
    for name in package.__all__:
        value = getattr(package, name)
        if callable(value):
            own = value.__dict__.get("__doc__") if isinstance(value, type) else value.__doc__
            generated = isinstance(value, type) and str(own).startswith(f"{name}(")
            assert own, name
            assert not generated, f"{name}: the docstring is that of dataclass"
        else:
            assert re.search(rf'(^#: .*\n{name}\b.* =)|(^{name}\b.*\n""")', sources, re.M), name


def listed_messages() -> list[str]:
    text = (DOCS / "troubleshooting.md").read_text()
    entries = re.findall(r"^(`.*`)\n:   ", text, re.M)
    return [message for entry in entries for message in re.findall(r"`([^`]+)`", entry)]


def expected_messages() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {"warnings": [], "errors": [], "classes": []}
    for source in messages.sources():
        found["warnings"] += messages.warnings_of(source)
        found["errors"] += messages.errors_of(source, "RuntimeError")
        found["errors"] += messages.errors_of(source, "ImportError")
        found["classes"] += messages.error_classes_of(source)
    return found


def test_every_warning_and_error_has_its_remedy() -> None:
    expected = expected_messages()
    assert len(expected["warnings"]) >= 14
    assert len(expected["errors"]) >= 25
    wanted = {message for group in expected.values() for message in group}
    listed = listed_messages()
    assert wanted - set(listed) == set(), "docs/troubleshooting.md has no entry"
    assert set(listed) - wanted == set(), "docs/troubleshooting.md explains what the source does not say"
    assert len(listed) == len(set(listed))
    assert all("`" not in message for message in wanted), "a message with backticks cannot be listed"


def test_each_warning_has_its_own_key() -> None:
    """A handle warns once per key: with a shared key, the second warning would never be shown."""
    keys = Counter(key for source in messages.sources() for key in messages.warning_keys_of(source))
    assert len(keys) >= 6
    assert keys.most_common(1)[0][1] == 1, keys


def test_messages_are_collected() -> None:
    source = (
        "import warnings\n"
        "def f(self, x):\n"
        "    warnings.warn(f'AdaCache: {x} is odd; ' f'try {x!r}', stacklevel=2)\n"
        "    self.warn('key', 'it was ' + 'changed')\n"
        "    raise RuntimeError(f'state: {x}') from None\n"
        "class Full(RuntimeError): ...\n"
        "class _Hidden(ValueError): ...\n"
        "class Plain: ...\n"
    )
    assert messages.warnings_of(source) == ["AdaCache: … is odd; try …", "AdaCache: it was changed"]
    assert messages.warning_keys_of(source) == ["key"]
    assert messages.errors_of(source, "RuntimeError") == ["state: …"]
    assert messages.error_classes_of(source) == ["Full"]


def test_generated_parts_cover_every_op_and_command(monkeypatch: pytest.MonkeyPatch) -> None:
    hooks = load(monkeypatch, "tools/docs_hooks.py")
    text = "".join(page.read_text() for page in MARKDOWN)
    assert set(hooks.MARKER.findall(text)) == set(hooks.GENERATED)
    shown = hooks.on_page_markdown("before\n<!-- generated: costs -->\nafter")
    assert shown.startswith("before\n| op |")
    assert shown.endswith("|\nafter")
    missing = {op for op in adacache_kernels.OPS if f"`{op}`" not in shown}
    assert missing <= {"decide"}  # its arguments have no tokens
    assert re.search(r"^\| `gated_residual` \| 3 E \| 330 \| bits \|$", shown, re.M)
    commands = hooks.commands()
    assert all(f"## adacache {name}\n" in commands for name in ("doctor", "calibrate", "compare"))


def blocks_of(text: str) -> list[tuple[str, str, str]]:
    """(line before, language, text) of each code block, also of indented ones."""
    pattern = re.compile(r"^(?P<before>.*)\n(?P<indent> *)```(\w*)\n(.*?)\n(?P=indent)```$", re.M | re.S)
    return [(m["before"], m[3], m[4]) for m in pattern.finditer(text)]


def is_python(text: str) -> bool:
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return False
    return any(
        isinstance(node, ast.Assign | ast.Import | ast.ImportFrom | ast.Call) for node in ast.walk(tree)
    )


@pytest.mark.parametrize("page", [ROOT / "README.md", *MARKDOWN], ids=lambda page: page.name)
def test_python_is_marked_as_python(page: Path) -> None:
    """So that test_docs_code.py runs it."""
    for _, language, text in blocks_of(page.read_text()):
        assert language == "python" or not is_python(text), f"{page.name}: mark as python:\n{text}"


def test_unmarked_python_is_detected() -> None:
    assert is_python("import adacache\nhandle = adacache.enable(model)")
    assert not is_python("make test\nmake demo")
    assert not is_python("x + gate * y")


def test_links_of_the_readme_work_on_a_package_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the address of the repository they are absolute, and what they point at exists."""
    setup = load(monkeypatch, "setup.py")
    text = (ROOT / "README.md").read_text()
    assert setup.readme("") == text
    address = "https://example.org/project"
    links = re.findall(r"\]\(([^)\s]+)\)", setup.readme(f"{address}/"))
    own = [link for link in links if link.startswith(address)]
    assert len(own) > 5
    for link in links:
        assert link.startswith("https://"), f"README: {link} is relative"
    for link in own:
        path = re.fullmatch(rf"{address}/(?:blob|raw)/main/([^#]+)(#.*)?", link)
        assert path, link
        assert (ROOT / path[1]).exists(), link
    assert setup.urls("") == {}
    assert setup.urls(address)["Repository"] == address

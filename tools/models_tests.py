# SPDX-License-Identifier: Apache-2.0
"""Writes docs/models_tests.md, the tests behind docs/models.md: `python tools/models_tests.py`."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "docs" / "models_tests.md"
TESTS = ROOT / "tests" / "models"

INTRODUCTION = """\
# Tests of the models

Written by `python tools/models_tests.py`; do not edit. All files are in `tests/models`.

## Checks of every class
Each check is a test function with the case in brackets, for example
`test_models.py::test_guidance_in_two_calls[WanTransformer3DModel]`. Twins have the structure of classes that
no package index ships. Classes of other repositories run if they are on `PYTHONPATH`, and are skipped
otherwise.
"""


def text() -> str:
    """The contents of the file."""
    import test_unknown
    from model_cases import CASES, TWINS, ids
    from pipeline_cases import PIPELINES
    from real_cases import REAL, REAL_PIPELINES
    from test_models import CHECKS

    groups = {
        "diffusers": ("test_models.py", CASES),
        "twin": ("test_models.py", TWINS),
        "other repository": ("test_real_code.py", REAL),
        "undeclared class": ("test_unknown.py", test_unknown.CHECKED),
    }
    lines = [INTRODUCTION, *(f"- `{name}`" for name in CHECKS)]
    lines += ["", "| class of | file | case | skipped checks |", "|---|---|---|---|"]
    for group, (file, cases) in groups.items():
        for case in cases:
            skipped = ", ".join(f"`{name}`" for name, check in CHECKS.items() if _skips(check, case))
            lines.append(f"| {group} | `{file}` | `{ids(case)}` | {skipped} |")
    lines += ["", "## Pipelines", "The pipelines run end to end.", ""]
    lines += [f"- `test_pipelines.py::test_end_to_end[{case}]`" for case in PIPELINES]
    lines += [f"- `test_real_code.py::test_pipeline_end_to_end[{case}]`" for case in REAL_PIPELINES]
    return "\n".join(lines) + "\n"


def _skips(check: Callable[..., Any], case: Any) -> bool:
    """Whether a check skips a case: it contains an `if` with `pytest.skip` whose condition is true."""
    tree = ast.parse(Path(check.__code__.co_filename).read_text())
    (function,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == check.__name__)
    return any(
        bool(eval(compile(ast.Expression(node.test), "<skip>", "eval"), {"case": case}))
        for node in ast.walk(function)
        if isinstance(node, ast.If) and "pytest.skip(" in ast.unparse(node.body[0])
    )


if __name__ == "__main__":
    sys.path[:0] = [str(TESTS), str(ROOT / "tests" / "ops")]
    FILE.write_text(text())

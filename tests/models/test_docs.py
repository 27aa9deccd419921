"""The tests that docs/models.md names are there, and the README's script runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import adacache
import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMED = re.compile(r"`([\w/]+\.py)::(\w+)(?:\[([^]`]*)\])?`")


def test_every_test_that_the_table_names_exists() -> None:
    pytest.importorskip("diffusers")
    import pipeline_cases
    import test_unknown
    from model_cases import CASES, TWINS, ids
    from real_cases import REAL, REAL_PIPELINES

    cases = {ids(case) for case in (*CASES, *TWINS, *REAL, *test_unknown.CHECKED)} | {
        str(case) for case in (*pipeline_cases.PIPELINES, *REAL_PIPELINES)
    }
    found = NAMED.findall((ROOT / "docs" / "models.md").read_text())
    assert len(found) > 150
    for path, function, parameters in found:
        file = ROOT / path if "/" in path else ROOT / "tests" / "models" / path
        text = file.read_text()
        if "globals().update(CHECKS)" in text:
            text += (ROOT / "tests" / "models" / "test_models.py").read_text()
        assert re.search(rf"^def {function}\(", text, re.M), f"{path}::{function} is not there"
        if parameters:
            assert parameters.removeprefix("stack-").removeprefix("dtype0-") in cases, parameters
    table = (ROOT / "docs" / "models.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    for case in CASES:
        assert any(line.startswith(f"| {case.name} |") for line in rows), f"{case.name} has no row"


def test_known_models_are_named() -> None:
    text = (ROOT / "docs" / "models.md").read_text()
    for names in adacache.known_models():
        for name in names.split(" | "):
            short = name.rpartition(".")[2].removesuffix("Transformer3DModel").removesuffix("Video")
            assert short.replace("LTX2", "LTX-2") in text, f"{name} is not named"


def test_readme_script_runs() -> None:
    pytest.importorskip("diffusers")
    section = (ROOT / "README.md").read_text().split("## A diffusers pipeline", 1)[1]
    script = section.split("```python", 1)[1].split("```", 1)[0]
    assert len(script.strip().splitlines()) <= 15
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "[1, 2," in done.stdout

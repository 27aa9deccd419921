# SPDX-License-Identifier: Apache-2.0
"""Options of the command `adacache`: invalid options raise before any work."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from adacache.calibration import Subject
from adacache.commands.cli import main
from adacache.commands.flops import latent_size
from adacache.commands.table import format_table


def subject(num_steps: int | None) -> tuple[Subject, list[str]]:
    def generate(prompt: str, seed: int) -> None:
        pytest.fail("the run started")

    return Subject(None, generate, num_steps or 30, "none"), [f"prompt {i}" for i in range(20)]


not_a_function = 3


def returns_nothing(num_steps: int | None) -> None:
    pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("verify {golden} --device meta", "--device: expected a device of this machine, .*got 'meta'"),
        ("verify {golden} --device cuda:99", "--device: expected a device"),
        ("verify {golden} --device abacus", "--device: expected a device"),
        ("verify {golden} --cache all", "--cache: invalid choice"),
        ("flops --num-steps 0", "--num-steps: expected a whole number of at least 1, got 0"),
        ("flops --num-steps 2.5", "--num-steps: expected a whole number of at least 1, got '2.5'"),
        ("flops --computed-steps nan", "--computed-steps: expected a number of at least 0, got nan"),
        ("flops --computed-steps 31", r"computed_steps: expected a number in 0..30, got 31.0"),
        ("flops --video 1x1x1", r"height: expected a whole number in 8..65536, got 1"),
        ("flops --video 0x8x8", r"frames: expected a whole number in 1..65536, got 0"),
        ("flops --video 9999999x8x8", "video: expected 480p-2s, 720p-2s or FRAMESxHEIGHTxWIDTH"),
        ("flops --video 16x64", "video: expected 480p-2s, 720p-2s or FRAMESxHEIGHTxWIDTH"),
        ("flops --trace {folder}/none.json", r"No such file.*none\.json"),
        ("demo --out {file}", "out: cannot create the folder"),
        ("calibrate {subject} --share nan", "--share: expected a number above 0 and at most 1, got nan"),
        ("calibrate {subject} --share 1.5", "--share: expected a number above 0 and at most 1, got 1.5"),
        ("calibrate {subject} --share .01", r"share: expected at least 6 of 30 steps \(0.2\), got 0.01"),
        ("calibrate {subject} --error 0", "--error: expected a number above 0, got 0.0"),
        ("calibrate {subject} --error inf", "--error: expected a number above 0, got inf"),
        ("calibrate {subject} --like open-sora/medium", "policy: expected one of"),
        ("calibrate {subject} --share .5 --error .1", "--error: not allowed with argument --share"),
        ("calibrate {subject} --tokens -4", "--tokens: expected a whole number of at least 1, got -4"),
        ("calibrate {subject} --num-steps 0", "--num-steps: expected a whole number of at least 1, got 0"),
        ("calibrate {subject} --count 0", "--count: expected a whole number of at least 1"),
        ("calibrate {subject} --held-out 0", "--held-out: expected a whole number of at least 1"),
        ("calibrate {subject} --probed -1", "--probed: expected a whole number of at least 0"),
        ("calibrate {subject} --seed -1", "--seed: expected a whole number in 0.."),
        ("calibrate {subject} --metric-block -1", "--metric-block: expected a whole number of at least 0"),
        ("calibrate {subject} --arguments [1]", r"--arguments: expected an object, got \[1\]"),
        ("calibrate {subject} --arguments {{", "--arguments: expected an object, got '{{'"),
        ("calibrate {subject} --prompts {folder}/none", "--prompts: expected an existing file"),
        ("calibrate {subject} --prompts {binary}", "expected UTF-8 text"),
        (
            "calibrate {subject} --count 17",
            r"--prompts: expected at least 21 \(--count \+ --held-out\), got 20",
        ),
        ("calibrate {subject} --out {folder}/none/x.json", "--out: cannot write .*No such file"),
        ("calibrate {subject} --out {folder}", "--out: cannot write .*Is a directory"),
        ("calibrate none", 'model: expected the folder of a saved diffusers pipeline or "module:function"'),
        ("calibrate no_such_module:x", "No module named 'no_such_module'"),
        (
            "calibrate test_commands:none",
            "a function of the module test_commands, got 'none'",
        ),
        ("calibrate test_commands:not_a_function", "model: expected a function of the module"),
        ("calibrate test_commands:returns_nothing", "model: expected a Subject and a list of prompts"),
    ],
)
def test_wrong_option(options: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "binary").write_bytes(b"\xff")
    places = {
        "golden": Path(__file__).with_name("golden"),
        "folder": tmp_path,
        "file": tmp_path / "file",
        "binary": tmp_path / "binary",
        "subject": "test_commands:subject" + ("" if "--out" in options else f" --out {tmp_path}/ok.json"),
    }
    try:
        status = main(options.format(**places).split())
    except SystemExit as ended:  # argparse
        status = ended.code
    assert status == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.strip().splitlines()[-1]
    assert re.search(message.replace("{{", r"\{"), last), last
    assert sorted(os.listdir(tmp_path)) == ["binary", "file"]


def test_latents_of_published_sizes() -> None:
    assert latent_size(51, 480, 854) == (15, 60, 106)
    assert latent_size(1, 8, 8) == (1, 1, 1)


def test_tables_escape_control_characters() -> None:
    table = format_table(["a"], [["x\x1b[2J"], ["y\nz"]])
    assert table.splitlines() == ["a", "--------", r"x\x1b[2J", r"y\nz"]

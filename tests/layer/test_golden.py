# SPDX-License-Identifier: Apache-2.0
"""Recorded runs of the published code: equal computed steps and latents; errors of damaged directories."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import hostile
import numpy as np
import pytest
import torch
from adacache.commands.cli import main
from adacache.commands.verify import GoldenError, read_case, verify
from models import GOLDEN
from safetensors.torch import load_file, save_file

import adacache_kernels

CASES = sorted(path.stem for path in GOLDEN.glob("*.json"))


def one_case(directory: Path, name: str) -> Path:
    """A directory with one recorded case."""
    for file in (f"{name}.json", f"{name}.npz", next(GOLDEN.glob("weights_*.safetensors")).name):
        shutil.copy(GOLDEN / file, directory / file)
    return directory


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["cpu", pytest.param("reference", marks=pytest.mark.sampled(5))])
def test_recorded_case(name: str, backend: str, tmp_path: Path) -> None:
    outcomes = list(verify(one_case(tmp_path, name), backends=[backend]))
    assert [o.cache for o in outcomes] == ["off", "stack", "sublayer"]
    for outcome in outcomes:
        assert outcome.steps_match, outcome
        assert outcome.latent_error <= 1e-5, outcome
        if outcome.cache != "off":
            assert outcome.distance_error <= 1e-4, outcome


def test_number_of_recorded_cases() -> None:
    assert len(CASES) == 10


def test_command_prints_a_table_and_fails_on_a_mismatch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = one_case(tmp_path, "fast30_tattn")
    assert main(["verify", str(directory), "--cache", "stack"]) == 0
    assert "2 of 2 runs are as recorded" in capsys.readouterr().out

    path = directory / "fast30_tattn.json"
    values = json.loads(path.read_text())
    values["computed_steps"][3] += 1
    path.write_text(json.dumps(values))
    assert main(["verify", str(directory), "--cache", "stack"]) == 1
    assert "MISS" in capsys.readouterr().out


def test_changed_latent_is_a_mismatch(tmp_path: Path) -> None:
    directory = one_case(tmp_path, "slow30_tattn")
    arrays = dict(np.load(directory / "slow30_tattn.npz"))
    arrays["z_adacache"] = arrays["z_adacache"] * 1.001
    np.savez(directory / "slow30_tattn.npz", **arrays)
    outcomes = list(verify(directory, backends=["reference"], caches=["stack"]))
    assert [outcome.passed for outcome in outcomes] == [True, False]


def drop_archive(directory: Path) -> None:
    (directory / "fast30_tattn.npz").unlink()


def cut_archive(directory: Path) -> None:
    path = directory / "fast30_tattn.npz"
    path.write_bytes(path.read_bytes()[:1000])


def drop_weights(directory: Path) -> None:
    next(directory.glob("weights_*")).unlink()


def cut_weights(directory: Path) -> None:
    path = next(directory.glob("weights_*"))
    path.write_bytes(path.read_bytes()[:4000])


def edit_array(name: str, change: Callable[[np.ndarray], np.ndarray | None]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        path = directory / "fast30_tattn.npz"
        arrays = dict(np.load(path))
        changed = change(arrays.pop(name))
        np.savez(path, **arrays, **({} if changed is None else {name: changed}))

    return edit


def edit_json(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        path = directory / "fast30_tattn.json"
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))

    return edit


def write_json(text: str) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        (directory / "fast30_tattn.json").write_bytes(text.encode(errors="surrogateescape"))

    return write


def extra_array(directory: Path) -> None:
    with zipfile.ZipFile(directory / "fast30_tattn.npz", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.npy", bytes(1 << 20))


def edit_weights(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        path = next(directory.glob("weights_*"))
        save_file({name: change(value) for name, value in load_file(path).items()}, path)

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_archive, "fast30_tattn.npz: missing"),
        (cut_archive, "fast30_tattn.npz: not readable"),
        (drop_weights, "expected one weights_"),
        (cut_weights, "safetensors"),
        (edit_array("z0", lambda a: None), "array z0 is missing"),
        (edit_array("y", lambda a: a[:1]), r"array y: expected \[2, 1, 12, 32\]"),
        (
            edit_array("z_adacache", lambda a: a * np.nan),
            "array z_adacache: contains values that are not finite",
        ),
        (edit_array("mask", lambda a: a.astype(np.float32)), "array mask: expected"),
        (edit_json(lambda v: v.pop("num_steps")), "num_steps: missing"),
        (edit_json(lambda v: v.update(cfg_scale="7")), "cfg_scale: expected a number, got '7'"),
        (
            edit_json(lambda v: v["adacache"].update(codebook=[])),
            "codebook: expected a list of 1 or more",
        ),
        (
            edit_json(lambda v: v["adacache"].update(cache_res="other")),
            "cache_res: expected one of t-attn",
        ),
        (edit_json(lambda v: v["model"].update(depth=5)), "missing spatial_blocks.4"),
        (edit_json(lambda v: v["model"].update(num_heads=5)), "hidden_size: expected"),
        (
            edit_json(lambda v: v["adacache"].update(cache_loc=[7])),
            r"metric_blocks: expected blocks in 0..3, got 7",
        ),
        (edit_json(lambda v: v.update(num_steps=True)), "num_steps: expected a whole number in 1..10000"),
        (edit_json(lambda v: v.update(num_steps=12)), r"computed_steps\[\d+\]: expected a .* in 1..12"),
        (edit_json(lambda v: v["model"].update(depth=10**9)), "model.depth: expected a .* in 1..256"),
        (edit_json(lambda v: v["model"].update(depth=200)), "missing spatial_blocks.4"),
        (edit_json(lambda v: v.update(frames=1 << 20)), "expected arrays and file of at most"),
        (
            edit_json(lambda v: v["adacache"].update(codebook=[[0.1, 2.7]])),
            r"adacache.codebook\[0\]\[1\]: expected a whole number of at least 1, got 2.7",
        ),
        (
            edit_json(lambda v: v["adacache"].update(codebook=[[0.1, 2], [0.1, 1]])),
            r"adacache.codebook\[1\]\[0\]: expected a threshold above 0.1, got 0.1",
        ),
        (edit_json(lambda v: v["metric_log"][0].pop("rel_l1")), r"metric_log\[0\].rel_l1: missing"),
        (write_json("[" * 100_000), "nested too deeply"),
        (write_json(" " * (17 << 20)), "expected at most 16777216 bytes"),
        (write_json('{"num_steps": 1, "num_steps": 2}'), "keys: expected each key once, got 'num_steps'"),
        (write_json("\udcff"), "expected UTF-8 text"),
        (edit_array("z0", lambda a: a.astype(np.float64)), r"array z0: expected .* float32, got .* float64"),
        (edit_array("z0", np.asfortranarray), "array z0: .* in Fortran order"),
        (extra_array, r"expected only \['z0', .*got array 'bomb'"),
        (edit_weights(torch.Tensor.char), "expected the type F64 or F32 or F16 or BF16, got I8"),
        (edit_weights(torch.Tensor.bool), "expected the type F64 or F32 or F16 or BF16, got BOOL"),
    ],
)
def test_damaged_directory(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    directory = one_case(tmp_path, "fast30_tattn")
    damage(directory)
    with pytest.raises(ValueError, match=message):
        list(verify(directory, backends=["reference"], caches=["stack"]))
    assert main(["verify", str(directory), "--backend", "reference"]) == 2


def test_invalid_fields_raise_golden_error(tmp_path: Path) -> None:
    """Each field replaced by each value of hostile.py: the case loads or raises `GoldenError`."""
    path = one_case(tmp_path, "fast30_tattn_moreg_strides") / "fast30_tattn_moreg_strides.json"
    refused: list[str] = []
    for values in hostile.variants(json.loads(path.read_text())):
        path.write_text(json.dumps(values))
        try:
            read_case(path)
        except GoldenError as error:
            refused.append(str(error))
    assert len(refused) > 500
    assert not any("\x1b" in message for message in refused)


def test_damaged_archives_raise_golden_error(tmp_path: Path) -> None:
    directory = one_case(tmp_path, "slow30_tattn")
    path, archive = directory / "slow30_tattn.json", directory / "slow30_tattn.npz"
    original = archive.read_bytes()
    generator = np.random.default_rng(0)
    refused = 0
    for position in generator.integers(0, len(original), 400):
        data = bytearray(original)
        data[position] ^= int(generator.integers(1, 256))
        archive.write_bytes(data)
        try:
            read_case(path)
        except GoldenError:
            refused += 1
    assert refused > 300


def test_control_characters_in_names_are_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = one_case(tmp_path, "slow30_tattn")
    for suffix in (".json", ".npz"):
        (directory / f"slow30_tattn{suffix}").rename(directory / f"a\x1b[31m\r{suffix}")
    assert main(["verify", str(directory), "--cache", "stack", "--backend", "cpu"]) == 0
    (directory / "a\x1b[31m\r.npz").unlink()
    assert main(["verify", str(directory), "--cache", "stack", "--backend", "cpu"]) == 2
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
    assert r"a\x1b[31m\r" in captured.out
    assert r"a\x1b[31m\r" in captured.err


def test_empty_and_missing_directories(tmp_path: Path) -> None:
    with pytest.raises(GoldenError, match="holds no CASE"):
        list(verify(tmp_path, backends=["reference"]))
    one_case(tmp_path, "slow30_tattn")
    (tmp_path / "other.npz").write_bytes(b"")
    with pytest.raises(GoldenError, match=r"no CASE.json beside other.npz"):
        list(verify(tmp_path, backends=["reference"]))
    with pytest.raises(GoldenError, match="no such directory"):
        list(verify(tmp_path / "nowhere", backends=["reference"]))


def test_missing_settings_have_the_published_defaults() -> None:
    case = read_case(GOLDEN / "fast30_camlp_moreg.json")
    assert "moreg_strides" not in case.settings
    motion = case.policy("stack").motion
    assert motion is not None
    assert motion.strides == (1,)


def test_backend_must_exist() -> None:
    assert main(["verify", str(GOLDEN), "--backend", "abacus"]) == 2
    assert "cpu" in adacache_kernels.BACKENDS

"""The recorded runs of the published code: same computed steps, same latent; and errors for damaged
directories."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from adacache.commands.cli import main
from adacache.commands.verify import GoldenError, read_case, verify
from models import GOLDEN

import adacache_kernels

CASES = sorted(path.stem for path in GOLDEN.glob("*.json"))
CPU_BACKENDS = ("cpu", "reference")


def one_case(directory: Path, name: str) -> Path:
    """A directory with one recorded case."""
    for file in (f"{name}.json", f"{name}.npz", next(GOLDEN.glob("weights_*.safetensors")).name):
        shutil.copy(GOLDEN / file, directory / file)
    return directory


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_recorded_case(name: str, backend: str, tmp_path: Path) -> None:
    outcomes = list(verify(one_case(tmp_path, name), backends=[backend]))
    assert [o.cache for o in outcomes] == ["off", "stack", "sublayer"]
    for outcome in outcomes:
        assert outcome.steps_match, outcome
        assert outcome.latent_error <= 1e-5, outcome
        if outcome.cache != "off":
            assert outcome.distance_error <= 1e-4, outcome


def test_all_cases_are_here() -> None:
    assert len(CASES) == 10


def test_command_prints_a_table_and_fails_on_a_miss(
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


def test_a_changed_latent_is_a_miss(tmp_path: Path) -> None:
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
            "array z_adacache: holds values that are not finite",
        ),
        (edit_array("mask", lambda a: a.astype(np.float32)), "array mask: expected"),
        (edit_json(lambda v: v.pop("num_steps")), "field num_steps is missing"),
        (edit_json(lambda v: v.update(cfg_scale="7")), "field cfg_scale: expected float, got '7'"),
        (edit_json(lambda v: v["adacache"].update(codebook=[])), "field adacache: codebook"),
        (edit_json(lambda v: v["adacache"].update(cache_res="other")), "field cache_res: expected one of"),
        (edit_json(lambda v: v["model"].update(depth=5)), "missing spatial_blocks.4"),
        (edit_json(lambda v: v["model"].update(num_heads=5)), "hidden_size: expected"),
        (
            edit_json(lambda v: v["adacache"].update(cache_loc=[7])),
            r"metric_blocks: expected blocks in 0..3, got 7",
        ),
    ],
)
def test_damaged_directory(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    directory = one_case(tmp_path, "fast30_tattn")
    damage(directory)
    with pytest.raises(ValueError, match=message):
        list(verify(directory, backends=["reference"], caches=["stack"]))
    assert main(["verify", str(directory), "--backend", "reference"]) == 2


def test_empty_and_missing_directories(tmp_path: Path) -> None:
    with pytest.raises(GoldenError, match="holds no CASE"):
        list(verify(tmp_path, backends=["reference"]))
    one_case(tmp_path, "slow30_tattn")
    (tmp_path / "other.npz").write_bytes(b"")
    with pytest.raises(GoldenError, match=r"no CASE.json beside other.npz"):
        list(verify(tmp_path, backends=["reference"]))
    with pytest.raises(GoldenError, match="no such directory"):
        list(verify(tmp_path / "nowhere", backends=["reference"]))


def test_settings_that_are_not_given_are_the_published_ones() -> None:
    case = read_case(GOLDEN / "fast30_camlp_moreg.json")
    assert "moreg_strides" not in case.settings
    motion = case.policy("stack").motion
    assert motion is not None
    assert motion.strides == (1,)


def test_backend_must_exist() -> None:
    assert main(["verify", str(GOLDEN), "--backend", "abacus"]) == 2
    assert "cpu" in adacache_kernels.BACKENDS

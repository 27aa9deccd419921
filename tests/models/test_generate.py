# SPDX-License-Identifier: Apache-2.0
"""`adacache generate`: a result and a trace per prompt, continued runs, prompts shared by processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from adacache.calibration import Subject
from adacache.commands.cli import main
from adacache.commands.generate import Place
from adacache.trace import Trace
from pipeline_cases import PIPELINES
from torch import Tensor

pytest.importorskip("diffusers", reason="diffusers is not installed")
pytest.importorskip("tqdm", reason="tqdm is not installed")
Image = pytest.importorskip("PIL.Image", reason="pillow is not installed")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

STEPS = 6
METHOD = ["--method", "Interval(interval=2)"]
ran: list[tuple[str, int]] = []
fails: set[str] = set()


def small_pipeline(num_steps: int | None = None) -> tuple[Subject, list[str]]:
    """Returns latents as a clip of pixels: three of their channels."""
    case = next(case for case in PIPELINES if str(case) == "WanPipeline")
    pipeline, steps = case.build(), num_steps or STEPS

    def generate(prompt: Any, seed: int) -> Tensor:
        ran.append((prompt, seed))
        if prompt in fails:
            raise RuntimeError(f"cannot draw {prompt}")
        return case.generate(pipeline, steps, seed=seed)[:, :3].sigmoid()

    return Subject(pipeline, generate, steps, "small"), []


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "prompts.txt").write_text("a cat\n\n a dog \na bird\n")
    ran.clear()
    fails.clear()
    return tmp_path


def generate(folder: Path, *options: str) -> int:
    command = ["generate", "test_generate:small_pipeline", str(folder / "prompts.txt")]
    return main([*command, "--out", str(folder / "out"), *(options or METHOD)])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "out").iterdir())


def prompts_that_ran() -> list[tuple[str, int]]:
    found = list(ran)
    ran.clear()
    return found


def test_a_clip_and_a_trace_per_prompt(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(folder, *METHOD, "--fps", "10", "--seed", "5") == 0
    assert prompts_that_ran() == [("a cat", 5), ("a dog", 6), ("a bird", 7)]
    files = [f"0000{n}{suffix}" for n in (1, 2, 3) for suffix in (".json", ".trace.json", ".webp")]
    assert names(folder) == files
    clip = Image.open(folder / "out" / "00002.webp")
    assert clip.n_frames > 1
    trace = Trace.load(folder / "out" / "00002.trace.json")
    result = json.loads((folder / "out" / "00002.json").read_text())
    assert result["prompt"] == "a dog"
    assert result["computed_steps"] == trace.computed_steps == [1, 3, 5]
    assert "3 of 3 prompts are in" in capsys.readouterr().out


def test_latents_are_those_of_a_run_of_its_own(folder: Path) -> None:
    from safetensors.torch import load_file

    assert generate(folder, "--method", "none", "--latents", "--num-steps", "4") == 0
    subject, _ = small_pipeline(4)
    for number in range(3):
        found = load_file(folder / "out" / f"0000{number + 1}.safetensors")["output"]
        assert torch.equal(found, subject.generate("", number))
    assert not list((folder / "out").glob("*.trace.json"))


def test_a_run_is_continued(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails.add("a dog")
    assert generate(folder) == 1
    printed = capsys.readouterr()
    assert "prompt 2: cannot draw a dog" in printed.err
    assert "1 prompts failed" in printed.err
    assert "2 of 3 prompts are in" in printed.out
    assert [name for name in names(folder) if name.startswith("00002")] == []
    prompts_that_ran()
    fails.clear()
    (folder / "out" / "00003.json").unlink()  # as if the run had been stopped before its last write
    assert generate(folder) == 0
    assert prompts_that_ran() == [("a dog", 1), ("a bird", 2)]
    assert generate(folder) == 0
    assert prompts_that_ran() == []


def test_processes_share_the_prompts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    shares = []
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        assert generate(folder) == 0
        shares.append(prompts_that_ran())
    assert shares == [[("a dog", 1)], [("a cat", 0), ("a bird", 2)]]
    assert len(names(folder)) == 9


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--method", "Interval(interval=3)"], "settings"),
        ([*METHOD, "--num-steps", "5"], "settings"),
        ([*METHOD, "--latents"], "settings"),
        ([*METHOD, "--seed", "1"], "seed"),
    ],
)
def test_results_of_another_run_are_not_taken(
    folder: Path, options: list[str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "prompts.txt").write_text("a cat\n")
    assert generate(folder) == 0
    assert generate(folder, *options) == 2
    assert f"00001.json has another {name}" in capsys.readouterr().err
    (folder / "prompts.txt").write_text("a cow\n")
    assert generate(folder) == 2
    assert "another prompt: 'a cat', this run has 'a cow'" in capsys.readouterr().err


def test_a_preset_on_the_digit_model(folder: Path) -> None:
    (folder / "prompts.txt").write_text("a 3 drifting right over a plain background\n")
    command = ["generate", "digits", str(folder / "prompts.txt"), "--out", str(folder / "out")]
    assert main([*command, "--method", "digits/fast"]) == 0
    trace = Trace.load(folder / "out" / "00001.trace.json")
    assert trace.policy["policy"] == "AdaCache"
    assert 4 < len(trace.computed_steps) < 30
    assert Image.open(folder / "out" / "00001.webp").n_frames == 16


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK: expected a whole number in 0..1, got 2"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: expected a whole number of at least 1, got 0"),
        ({"RANK": "first"}, "RANK: expected a whole number"),
    ],
)
def test_wrong_environment(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Place.of(environment)


class RayStandIn:
    """The calls of Ray that the command makes, in this process. An actor runs in `get`."""

    class exceptions:
        class RayError(Exception):
            """Of the cluster."""

        class RayTaskError(RayError):
            def __init__(self, cause: Exception):
                super().__init__("raised in a task")
                self.cause = cause

    def __init__(self, gpus: int, lost: set[int] | None = None):
        self.gpus = gpus
        self.lost = lost or set()
        self.settings: dict[str, Any] = {}
        self.addresses: list[Any] = []
        self.actors = 0

    def is_initialized(self) -> bool:
        return False

    def init(self, address: str | None, **settings: Any) -> None:
        self.addresses.append(address)

    def shutdown(self) -> None:
        self.addresses.append("closed")

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 4.0} | ({"GPU": float(self.gpus)} if self.gpus else {})

    def remote(self, kind: Any) -> Any:
        cluster = self

        class Method:
            def __init__(self, bound: Any):
                self.bound = bound

            def remote(self, *args: Any) -> Any:
                return lambda: cluster.run(self.bound, args)

        class Actor:
            def __init__(self, *args: Any):
                cluster.actors += 1
                worker = kind(*args)
                self.state, self.generate = Method(worker.state), Method(worker.generate)

        class Class:
            def options(self, **settings: Any) -> Class:
                cluster.settings = settings
                return self

            def remote(self, *args: Any) -> Actor:
                return Actor(*args)

        return Class()

    def run(self, bound: Any, args: Any) -> Any:
        if args and args[0] in self.lost:
            raise self.exceptions.RayError("its machine was lost")
        try:
            return bound(*args)
        except Exception as error:
            raise self.exceptions.RayTaskError(error) from error

    def wait(self, running: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        return running[:num_returns], running[num_returns:]

    def get(self, result: Any) -> Any:
        return result()


def test_ray_workers_share_the_prompts(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a stand-in for Ray."""
    cluster = RayStandIn(gpus=2, lost={2})
    monkeypatch.setitem(sys.modules, "ray", cluster)
    fails.add("a dog")
    assert generate(folder, *METHOD, "--ray", "head:6379") == 1
    printed = capsys.readouterr()
    assert "prompt 2: cannot draw a dog" in printed.err
    assert "prompt 3: RayError: its machine was lost" in printed.err
    assert "1 of 3 prompts are in" in printed.out
    assert cluster.addresses == ["head:6379", "closed"]
    assert cluster.settings["num_gpus"] == 1
    assert cluster.actors == 2
    # Without a worker, the prompts that are left fail.
    monkeypatch.setitem(sys.modules, "ray", RayStandIn(gpus=1, lost={1}))
    assert generate(folder, *METHOD, "--ray") == 1
    assert "prompt 3: no worker is left" in capsys.readouterr().err
    fails.clear()
    prompts_that_ran()
    monkeypatch.setitem(sys.modules, "ray", RayStandIn(gpus=0))
    assert generate(folder, *METHOD, "--ray", "--workers", "8") == 0
    assert sorted(prompts_that_ran()) == [("a bird", 2), ("a dog", 1)]
    ray_files = {name: (folder / "out" / name).read_bytes() for name in names(folder) if "json" not in name}
    for path in (folder / "out").iterdir():
        path.unlink()
    assert generate(folder) == 0
    assert {name: (folder / "out" / name).read_bytes() for name in ray_files} == ray_files
    # A finished run, and errors of the workers.
    assert generate(folder, *METHOD, "--ray") == 0
    assert generate(folder, "--method", "Interval(interval=3)", "--ray") == 2
    assert "00001.json has another settings" in capsys.readouterr().err


def test_without_ray(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert generate(folder, *METHOD, "--ray") == 2
    assert "Ray is not installed; pip install 'adacache-kernels[ray]'" in capsys.readouterr().err
    assert generate(folder, *METHOD, "--workers", "2") == 2
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert generate(folder, *METHOD, "--ray") == 2
    assert "--ray: expected one process, got 2 of torchrun" in capsys.readouterr().err
    assert prompts_that_ran() == []


@pytest.mark.slow
@pytest.mark.timeout(900)  # each worker imports torch and diffusers
def test_on_a_local_ray(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers of a cluster on this machine, which ends with the command."""
    pytest.importorskip("ray", reason="ray is not installed")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    assert generate(folder, *METHOD, "--ray", "--workers", "2") == 0
    assert prompts_that_ran() == []  # not in this process
    assert len(names(folder)) == 9
    assert Trace.load(folder / "out" / "00003.trace.json").computed_steps == [1, 3, 5]
    assert generate(folder) == 0
    assert prompts_that_ran() == []


def test_wrong_arguments(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(folder, "--method", "Taylor(interval=3)") == 2
    assert "--method: expected a class" in capsys.readouterr().err
    (folder / "prompts.txt").write_text("\n")
    assert generate(folder) == 2
    assert "prompts: expected a file with at least one prompt" in capsys.readouterr().err
    assert not (folder / "out").exists()

# SPDX-License-Identifier: Apache-2.0
"""The checks of wheels and releases: faults are found; equal sources give equal wheels."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from tool_loading import ROOT, load

import adacache_kernels

SOURCE = """
#include <string.h>
#include <stdio.h>
extern "C" int copy(char* to, const char* from, int n) {
  char here[64];
  memcpy(here, from, n);
  strcpy(to, here);
  return sprintf(here, "%d", n) + here[n % 7];
}
"""
HARDENED = ["-O2", "-fstack-protector-strong", "-D_FORTIFY_SOURCE=2", "-Wl,-z,relro,-z,now"]


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(monkeypatch, "tools/wheel_report.py")


def library(folder: Path, *options: str) -> Path:
    compiler = shutil.which("c++") or pytest.skip("no C++ compiler")
    (folder / "source.cpp").write_text(SOURCE)
    target = folder / "library.so"
    command = [compiler, "-shared", "-fPIC", "-w", *options, "source.cpp", "-o", str(target)]
    subprocess.run(command, cwd=folder, check=True)
    return target


def test_hardened_library_has_no_fault(report: ModuleType, tmp_path: Path) -> None:
    path = library(tmp_path, *HARDENED)
    assert report.hardening_faults("one.so", path) == []
    assert any("__memcpy_chk" in symbol for symbol in report.undefined_symbols(path))


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["-fno-stack-protector"], "no stack protector"),
        (["-Wl,-z,norelro"], "no RELRO"),
        (["-Wl,-z,lazy"], "RELRO is partial"),
        (["-Wl,-z,execstack"], "the stack is executable"),
        (["-Wl,-rpath,/opt/there"], "RUNPATH /opt/there"),
        (["-Wl,-rpath,/opt/there", "-Wl,--disable-new-dtags"], "RPATH /opt/there"),
    ],
)
def test_hardening_faults(report: ModuleType, tmp_path: Path, options: list[str], fault: str) -> None:
    faults = report.hardening_faults("one.so", library(tmp_path, *HARDENED, *options))
    assert len(faults) == 1
    assert faults[0].startswith(f"one.so: {fault}")


def test_tags(report: ModuleType) -> None:
    name = "adacache_kernels-0.2.0-cp311-cp311-{}.whl"
    good = name.format("manylinux_2_28_x86_64.manylinux_2_34_x86_64")
    assert report.tag_faults(good) == []
    assert report.glibc_of_tag(good) == (2, 28)
    for tag in ("linux_x86_64", "manylinux_x86_64"):
        assert report.tag_faults(name.format(tag)) == [
            f"tag {tag}: indexes accept manylinux_X_Y only; run `make wheels`"
        ]
    assert report.glibc_of_tag(name.format("linux_x86_64")) is None


def test_glibc_newer_than_the_tag_is_a_fault(report: ModuleType) -> None:
    symbols = ["pow@GLIBC_2.29", "memcpy@GLIBC_2.14", "pthread_create@GLIBC_2.34", "some_function"]
    assert report.glibc_faults("a.so", symbols, (2, 34)) == []
    assert [text.split()[1] for text in report.glibc_faults("a.so", symbols, (2, 28))] == [
        "pow@GLIBC_2.29",
        "pthread_create@GLIBC_2.34",
    ]
    assert report.glibc_faults("a.so", symbols, None) == []


def test_paths_of_the_machine_are_faults(report: ModuleType) -> None:
    fine = b"\0torch/include/x.h\0./csrc/cpu/a.cpp\0/usr/lib/libc.so\0/dev/shm\0https://host/home/x\0"
    assert report.path_faults("a.so", fine) == []
    for path in ("/home/someone/torch/x.h", "/root/a.cpp", f"{ROOT}/csrc/a.cpp"):
        faults = report.path_faults("a.so", fine + path.encode())
        assert any(path.startswith(fault.split()[-1]) for fault in faults)


def test_ops_are_taken_from_a_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wheels = load(monkeypatch, "tools/wheels.py")
    wheel = tmp_path / "one.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("_ops_cpu.so", "_ops_cuda.so", "_build_info.json", "_engine.so", "ops/decide.py"):
            archive.writestr(f"adacache_kernels/{name}", name)
    wheels.take_ops(wheel, tmp_path / "ops")
    names = sorted(path.name for path in (tmp_path / "ops").iterdir())
    assert names == ["_build_info.json", "_ops_cpu.so", "_ops_cuda.so"]


def test_pythons_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = load(monkeypatch, "tools/wheels.py")
    own = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert wheels.find_pythons([own], True) == {own: Path(sys.executable)}
    assert wheels.find_pythons([sys.executable], True) == {own: Path(sys.executable)}
    assert wheels.find_pythons(["3.1"], False) == {}
    monkeypatch.setattr(
        wheels, "on_path", lambda _: [Path("/bin/false"), Path("/none"), Path(sys.executable)]
    )
    assert wheels.find_pythons([own], True) == {own: Path(sys.executable)}
    with pytest.raises(SystemExit, match=r"--python: no interpreter found for 3\.1"):
        wheels.find_pythons(["3.1"], True)


def test_versions_have_to_agree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    release = load(monkeypatch, "tools/release.py")
    version = release.check_version()
    for name in ("pyproject.toml", "CITATION.cff", "CHANGELOG.md"):
        shutil.copy2(ROOT / name, tmp_path)
    monkeypatch.setattr(release, "ROOT", tmp_path)
    citation = tmp_path / "CITATION.cff"
    citation.write_text(citation.read_text().replace(f"version: {version}", "version: 0.0.1"))
    with pytest.raises(SystemExit, match=r"the versions differ: .*CITATION\.cff has 0\.0\.1"):
        release.check_version()


def test_probe_of_an_installed_wheel_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not adacache_kernels.build_info()["libraries"]["cpu"]["loaded"]:
        pytest.skip("the op libraries are not built")
    exec(load(monkeypatch, "tools/release.py").PROBE, {})
    assert capsys.readouterr().out.startswith("the installed wheel runs; engine: _engine")


def test_a_folder_without_ops_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    setuptools = pytest.importorskip("setuptools", reason="setuptools is not installed")
    setup = load(monkeypatch, "setup.py")
    monkeypatch.setenv("ADACACHE_OPS", str(tmp_path))
    command = setup.CMakeBuild(setuptools.Distribution())
    with pytest.raises(SystemExit, match=r"expected a folder with _build_info\.json"):
        command.run()


def test_sdist_contains_every_file(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", reason="setuptools is not installed")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    listed = set((tmp_path / "adacache_kernels.egg-info" / "SOURCES.txt").read_text().splitlines())
    missing = set(tracked.stdout.splitlines()) - listed - {".gitignore"}
    assert missing == set(), "add them to MANIFEST.in"
    assert not any(name.endswith((".so", "_build_info.json")) for name in listed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_folders_give_identical_wheels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A quick CPU build."""
    built_copy = load(monkeypatch, "tools/built_copy.py")
    variables = {"ADACACHE_CUDA": "0", "CMAKE_ARGS": "-DADACACHE_QUICK=ON"}
    variables["SOURCE_DATE_EPOCH"] = "1735689600"
    digests = []
    for name in ("first", "another_folder"):
        tree = tmp_path / name / "tree"
        built_copy.copy_sources(ROOT, tree)
        command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-index", "--no-build-isolation"]
        command += ["--no-deps", "-w", str(tree / "out"), str(tree)]
        subprocess.run(command, check=True, env={**os.environ, **variables}, cwd=tree)
        (wheel,) = (tree / "out").glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            digests.append({n: hashlib.sha256(archive.read(n)).hexdigest() for n in archive.namelist()})
        digests[-1]["the wheel"] = hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert any(name.endswith("_ops_cpu.so") for name in digests[0])
    assert {name for name in digests[0] if digests[0][name] != digests[1].get(name)} == set()

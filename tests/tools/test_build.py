# SPDX-License-Identifier: Apache-2.0
"""Build decisions of setup.py, the build record, and failures of the tools that check the wheel."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from types import ModuleType

import pytest
from tool_loading import ROOT, load

import adacache_kernels

NVCC = r"""#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release 12.6, V12.6.20" ;;
  --list-gpu-code) printf 'sm_80\nsm_86\nsm_89\nsm_90\n' ;;
  --dryrun) echo '#$ TOP=@TOP@' >&2 ;;
esac
"""


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("setuptools", reason="setuptools is not installed")
    for name in ("ADACACHE_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH", "CUDACXX"):
        monkeypatch.delenv(name, raising=False)
    return load(monkeypatch, "setup.py")


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CUDA toolkit whose nvcc supports architectures up to sm_90."""
    for file in ("include/cuda_runtime.h", "lib64/libcudart_static.a"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).touch()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(NVCC.replace("@TOP@", str(tmp_path)))
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    return tmp_path


def torch_with(setup: ModuleType, cuda: str | None):  # type: ignore[no-untyped-def]
    return setup.Torch(Path("torch"), "2.99.0", cuda)


def test_architectures_are_parsed_as_in_torch(setup: ModuleType) -> None:
    assert setup.parse_architectures("8.0;9.0a 12.0+PTX") == ["80", "90a", "120+PTX"]
    assert setup.parse_architectures("Hopper, 8.6, 8.6") == ["90+PTX", "86"]


@pytest.mark.parametrize("listed", ["7.5", "sm_90", "9", "9.0;Volta"])
def test_architectures_that_cannot_be_built_are_named(setup: ModuleType, listed: str) -> None:
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST: expected"):
        setup.parse_architectures(listed)


def test_default_architectures_end_with_ptx_and_list_unsupported_ones(
    setup: ModuleType, toolkit: Path
) -> None:
    cuda = setup.decide_cuda(torch_with(setup, "13.0"))
    assert cuda.built
    assert cuda.version == "12.6.20"
    assert cuda.architectures == ["80", "86", "89", "90+PTX"]
    assert cuda.dropped == ["100", "120"]
    assert cuda.gencode[-1] == "-gencode=arch=compute_90,code=compute_90"
    assert cuda.include == [str(toolkit / "include")]
    assert cuda.flags == []


def test_listed_architecture_without_nvcc_support_is_an_error(
    setup: ModuleType, toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0;12.0")
    with pytest.raises(SystemExit, match=r"nvcc 12\.6\.20 does not support 120"):
        setup.decide_cuda(torch_with(setup, "13.0"))


def test_cuda_is_off_without_cuda_in_torch_unless_forced(
    setup: ModuleType, toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not setup.decide_cuda(torch_with(setup, None)).built
    monkeypatch.setenv("ADACACHE_CUDA", "1")
    assert setup.decide_cuda(torch_with(setup, None)).built
    monkeypatch.setenv("ADACACHE_CUDA", "0")
    assert setup.decide_cuda(torch_with(setup, "13.0")).reason == "disabled by ADACACHE_CUDA=0"
    monkeypatch.setenv("ADACACHE_CUDA", "yes")
    with pytest.raises(SystemExit, match="ADACACHE_CUDA: expected 0, 1 or auto, got 'yes'"):
        setup.decide_cuda(torch_with(setup, "13.0"))


def test_missing_nvcc_is_reported_and_raises_if_cuda_is_forced(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    cuda = setup.decide_cuda(torch_with(setup, "13.0"))
    assert not cuda.built
    assert "nvcc not found" in cuda.reason
    monkeypatch.setenv("ADACACHE_CUDA", "1")
    with pytest.raises(SystemExit, match="ADACACHE_CUDA=1 requires nvcc, but it was not found"):
        setup.decide_cuda(torch_with(setup, "13.0"))


def test_build_info_records_the_build() -> None:
    info = adacache_kernels.build_info()
    project = (ROOT / "pyproject.toml").read_text()
    assert f'\nversion = "{info["version"]}"\n' in project, "run make build"
    assert info["torch_target"] == "2.11"
    assert set(info["libraries"]) == {"cpu", "cuda", "engine"}
    for library in info["libraries"].values():
        assert library["loaded"] == (library["reason"] == "")
    assert info["cuda"]["built"] == bool(info["cuda"]["architectures"])
    json.dumps(info)


def test_wheel_report_detects_forbidden_symbols(monkeypatch: pytest.MonkeyPatch) -> None:
    report = load(monkeypatch, "tools/wheel_report.py")

    def group(symbol: str) -> str:
        return next((name for name, pattern in report.GROUPS if pattern.search(symbol)), "other")

    forbidden = [
        "_ZN2at4_ops5empty4callEv",
        "_ZN3c104impl3cow11materializeEv",
        "_ZN5torch8autogradE",
        "PyErr_Clear",
    ]
    assert all(group(symbol) in report.FORBIDDEN_IN_OPS for symbol in [*forbidden, "some_function"])
    allowed = [
        "aoti_torch_get_numel",
        "_ZNSt13runtime_errorD1Ev@GLIBCXX_3.4",
        "memcpy@GLIBC_2.14",
        "torch_list_size",
    ]
    assert not any(group(symbol) in report.FORBIDDEN_IN_OPS for symbol in allowed)

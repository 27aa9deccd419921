# SPDX-License-Identifier: Apache-2.0
"""Builds the libraries: selects CUDA and its architectures, then runs CMake with Ninja.

Environment: ADACACHE_CUDA=0|1 disables or requires CUDA; TORCH_CUDA_ARCH_LIST ("8.0;9.0a;12.0+PTX") replaces
the default architectures; CUDA_HOME, CUDACXX, CXX, MAX_JOBS and CMAKE_ARGS have their usual meaning;
ADACACHE_CCACHE=0 disables ccache. ADACACHE_OPS=FOLDER takes the op libraries and their record from a folder
and builds only the module for this Python: the op libraries fit every Python (tools/wheels.py).
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE = "adacache_kernels"
OLDEST_TORCH = (2, 11)
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")  # + PTX of the last
ARCHITECTURE_NAMES = {
    "ampere": "8.0;8.6+PTX",
    "ada": "8.9+PTX",
    "hopper": "9.0+PTX",
    "blackwell": "10.0;12.0+PTX",
}


class BuildError(SystemExit):
    """Ends the build with a message, without a traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(f"\nadacache-kernels: {message}\n")


def say(message: str) -> None:
    print(f"adacache-kernels: {message}", file=sys.stderr, flush=True)


@dataclass
class Torch:
    """The torch of the build. It is not imported, because that may require CUDA libraries."""

    folder: Path
    version: str
    cuda: str | None

    @staticmethod
    def find() -> Torch:
        spec = importlib.util.find_spec("torch")
        if spec is None or spec.origin is None:
            raise BuildError(
                f"torch >= {'.'.join(map(str, OLDEST_TORCH))} must be installed for a build without "
                "isolation: pip install torch"
            )
        folder = Path(spec.origin).parent
        facts = runpy.run_path(str(folder / "version.py"))
        version = str(facts["__version__"])
        if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST_TORCH:
            raise BuildError(f"torch: expected >= {'.'.join(map(str, OLDEST_TORCH))}, found {version}")
        return Torch(folder, version, facts.get("cuda"))


@dataclass
class Cuda:
    """Whether and why the CUDA library is built, with nvcc, architectures and flags."""

    built: bool
    reason: str
    nvcc: str = ""
    version: str = ""
    architectures: list[str] = field(default_factory=list)  # "80", "90a", "120+PTX"
    dropped: list[str] = field(default_factory=list)  # default architectures that nvcc does not support
    include: list[str] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)  # paths for nvcc if the toolkit consists of pip packages

    @property
    def gencode(self) -> list[str]:
        options = []
        for architecture in self.architectures:
            number = architecture.removesuffix("+PTX")
            options.append(f"-gencode=arch=compute_{number},code=sm_{number}")
            if architecture.endswith("+PTX"):
                options.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        return options


def decide_cuda(torch: Torch) -> Cuda:
    """CUDA is built if torch has CUDA and nvcc is found. No GPU is needed."""
    forced = os.environ.get("ADACACHE_CUDA", "").strip().lower()
    if forced not in ("", "auto", "0", "1"):
        raise BuildError(f"ADACACHE_CUDA: expected 0, 1 or auto, got {forced!r}")
    if forced == "0":
        return Cuda(False, "disabled by ADACACHE_CUDA=0")
    if torch.cuda is None and forced != "1":
        return Cuda(False, f"torch {torch.version} has no CUDA (ADACACHE_CUDA=1 builds CUDA anyway)")
    nvcc, looked = find_nvcc()
    if nvcc is None:
        if forced == "1":
            raise BuildError(
                f"ADACACHE_CUDA=1 requires nvcc, but it was not found; searched: {'; '.join(looked)}. "
                "Install a CUDA toolkit and set CUDA_HOME, or pip install 'cuda-toolkit[nvcc]'."
            )
        return Cuda(False, f"nvcc not found; searched: {'; '.join(looked)}")
    version, known = ask_nvcc(nvcc)
    cuda = Cuda(
        True,
        "required by ADACACHE_CUDA=1" if forced == "1" else "torch has CUDA and nvcc was found",
        nvcc,
        version,
    )
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if listed:
        cuda.architectures = parse_architectures(listed)
        unknown = [
            a for a in cuda.architectures if known and a.removesuffix("+PTX").rstrip("af") not in known
        ]
        if unknown:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST={listed}: nvcc {version} does not support {', '.join(unknown)}"
            )
        cuda.reason += f"; architectures from TORCH_CUDA_ARCH_LIST={listed}"
    else:
        kept = [a for a in ARCHITECTURES if not known or a in known]
        cuda.dropped = [a for a in ARCHITECTURES if a not in kept]
        if not kept:
            raise BuildError(
                f"nvcc {version} supports none of sm_{', sm_'.join(ARCHITECTURES)}; set TORCH_CUDA_ARCH_LIST"
            )
        cuda.architectures = [*kept[:-1], f"{kept[-1]}+PTX"]
    find_cuda_pieces(cuda, torch)
    return cuda


def find_nvcc() -> tuple[str | None, list[str]]:
    """nvcc by CUDACXX, CUDA_HOME, CUDA_PATH, otherwise on PATH, in pip packages, in /usr/local/cuda. Also
    returns the searched places."""
    looked: list[str] = []
    for name, tail in (("CUDACXX", ""), ("CUDA_HOME", "bin/nvcc"), ("CUDA_PATH", "bin/nvcc")):
        value = os.environ.get(name)
        if value:
            looked.append(f"{name}={value}")
            path = shutil.which(os.path.join(value, tail) if tail else value)
            if path or name == "CUDA_HOME":
                return path, looked
    looked.append("PATH")
    candidates = [shutil.which("nvcc")]
    looked.append("nvidia/*/bin of site-packages")
    candidates += [str(p) for folder in pip_cuda_folders() for p in [folder / "bin" / "nvcc"] if p.exists()]
    looked.append("/usr/local/cuda/bin")
    candidates.append(shutil.which("/usr/local/cuda/bin/nvcc"))
    return next((c for c in candidates if c), None), looked


def pip_cuda_folders() -> list[Path]:
    """Folders of the CUDA packages of pip, such as site-packages/nvidia/cu13; newest first."""
    places = [Path(p) / "nvidia" for p in sys.path if p]
    return sorted(
        (f for p in places if p.is_dir() for f in p.glob("cu[0-9]*")), key=lambda f: f.name, reverse=True
    )


def ask_nvcc(nvcc: str) -> tuple[str, set[str]]:
    """The version of nvcc and the architectures that it supports."""
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        codes = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"{nvcc} does not run: {error}") from None
    match = re.search(r"V(\d+\.\d+\.\d+)", text)
    return match.group(1) if match else "unknown", set(re.findall(r"sm_(\d+)", codes))


def parse_architectures(listed: str) -> list[str]:
    """Parses TORCH_CUDA_ARCH_LIST like torch: "8.0;9.0a+PTX" or names, separated by semicolons or spaces."""
    architectures: list[str] = []
    for entry in re.split(r"[;,\s]+", listed):
        entry = ARCHITECTURE_NAMES.get(entry.lower(), entry)
        for item in filter(None, entry.split(";")):
            match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", item, re.IGNORECASE)
            if match is None:
                raise BuildError(
                    f'TORCH_CUDA_ARCH_LIST: expected entries such as 9.0, 9.0a, 12.0+PTX, got "{item}"'
                )
            number = match.group(1) + match.group(2) + match.group(3).lower()
            if int(match.group(1)) < 8:
                raise BuildError(
                    f'TORCH_CUDA_ARCH_LIST: expected architectures >= 8.0 (bfloat16), got "{item}"'
                )
            architecture = number + ("+PTX" if match.group(4) else "")
            if architecture not in architectures:
                architectures.append(architecture)
    return architectures


def find_cuda_pieces(cuda: Cuda, torch: Torch) -> None:
    """Finds headers and the static runtime, which pip packages may install outside the folder of nvcc."""
    top = Path(cuda.nvcc).resolve().parent.parent
    dryrun = subprocess.run(
        [cuda.nvcc, "--dryrun", "-x", "cu", "-E", os.devnull], capture_output=True, text=True
    ).stderr
    match = re.search(r"^#\$ TOP=(.*)$", dryrun, re.MULTILINE)
    if match:
        top = Path(match.group(1).strip())
    homes = [top, *pip_cuda_folders()]
    headers = [h / "include" for h in homes if (h / "include" / "cuda_runtime.h").exists()]
    if not headers:
        raise BuildError(f"cuda_runtime.h: not found for nvcc {cuda.nvcc}: pip install nvidia-cuda-runtime")
    cuda.include = list(dict.fromkeys([str(headers[0]), str(top / "include")]))  # the latter has crt/
    if headers[0] != top / "include":
        cuda.flags.append(f"-isystem {headers[0]}")
    runtimes = [f for h in homes for f in (h / "lib64", h / "lib") if (f / "libcudart_static.a").exists()]
    if not runtimes and not list(top.glob("targets/*/lib/libcudart_static.a")):
        raise BuildError(
            f"libcudart_static.a: not found for nvcc {cuda.nvcc}: pip install nvidia-cuda-runtime"
        )
    if runtimes and runtimes[0] != top / "lib64":
        cuda.flags.append(f"-L{runtimes[0]}")


def find_tool(name: str) -> str:
    """The path of cmake or ninja: from the packages of this Python, otherwise on PATH."""
    places = [sysconfig.get_path("scripts")]
    if importlib.util.find_spec(name) is not None:  # scripts of a build environment may not be on PATH
        module = __import__(name)
        places.insert(0, getattr(module, "CMAKE_BIN_DIR", None) or getattr(module, "BIN_DIR", ""))
    for place in places:
        path = shutil.which(name, path=place) if place else None
        if path:
            return path
    found = shutil.which(name)
    if found is None:
        raise BuildError(f"{name} is required for the build and not installed: pip install {name}")
    return found


class CMakeBuild(build_ext):
    """Builds the three targets in build/cmake-* incrementally, and copies them to the package."""

    def run(self) -> None:
        prebuilt = os.environ.get("ADACACHE_OPS", "").strip()
        if prebuilt:
            self.run_with_ops(Path(prebuilt).resolve())
            return
        torch = Torch.find()
        cuda = decide_cuda(torch)
        say(f"torch {torch.version} (CUDA {torch.cuda or 'none'}), Python {platform.python_version()}")
        if cuda.built:
            listed = ", ".join(f"sm_{a}" for a in cuda.architectures)
            say(f"CUDA library: built with nvcc {cuda.version} for {listed} ({cuda.reason})")
            if cuda.dropped:
                say(f"CUDA library: skipped sm_{', sm_'.join(cuda.dropped)}: not supported by this nvcc")
        else:
            say(f"CUDA library: NOT built: {cuda.reason}")
        folder = ROOT / "build" / f"cmake-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        compiler = self.compile(folder, torch, cuda)
        info = {
            "version": self.distribution.get_version(),
            "torch": torch.version,
            "torch_cuda": torch.cuda,
            "torch_target": ".".join(map(str, OLDEST_TORCH)),
            "python": platform.python_version(),
            "platform": sysconfig.get_platform(),
            "compiler": compiler,
            "build_type": "Debug" if self.debug else "Release",
            "cuda": {
                "built": cuda.built,
                "reason": cuda.reason,
                "nvcc": cuda.version or None,
                "architectures": cuda.architectures,
                "dropped": cuda.dropped,
            },
        }
        self.place([folder / name for name in self.outputs(cuda.built)], info)

    def run_with_ops(self, ops: Path) -> None:
        """Takes the op libraries from a folder and builds the module for this Python. torch is not needed."""
        record = ops / "_build_info.json"
        if not record.is_file():
            raise BuildError(f"ADACACHE_OPS={ops}: expected a folder with _build_info.json and _ops_*.so")
        info = json.loads(record.read_text())
        version = self.distribution.get_version()
        if info["version"] != version:
            raise BuildError(f"ADACACHE_OPS={ops}: built from version {info['version']}, this is {version}")
        say(f"op libraries: taken from {ops}, built with torch {info['torch']}")
        folder = ROOT / "build" / f"cmake-{sysconfig.get_platform()}-{sys.implementation.cache_tag}-engine"
        self.compile(folder, None, Cuda(False, "taken from ADACACHE_OPS"))
        *libraries, engine = self.outputs(info["cuda"]["built"])
        info["python"] = platform.python_version()
        self.place([*(ops / name for name in libraries), folder / engine], info)

    def compile(self, folder: Path, torch: Torch | None, cuda: Cuda) -> str:
        try:
            import pybind11
        except ImportError:
            raise BuildError("pybind11 is required for the build: pip install pybind11") from None

        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        settings = {
            "CMAKE_MAKE_PROGRAM": ninja,
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "ADACACHE_ENGINE_ONLY": "ON" if torch is None else "OFF",
            "ADACACHE_TORCH_DIR": "" if torch is None else torch.folder,
            "ADACACHE_PYBIND11_INCLUDE": pybind11.get_include(),
            "ADACACHE_PYTHON": sys.executable,
            "ADACACHE_PYTHON_INCLUDE": sysconfig.get_path("include"),
            "ADACACHE_PYTHON_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
            "ADACACHE_CUDA": "ON" if cuda.built else "OFF",
        }
        if cuda.built:
            settings["CMAKE_CUDA_COMPILER"] = cuda.nvcc
            settings["ADACACHE_CUDA_GENCODE"] = ";".join(cuda.gencode)
            settings["ADACACHE_CUDA_INCLUDE"] = ";".join(cuda.include)
            settings["ADACACHE_CUDA_FLAGS"] = " ".join(cuda.flags)
        ccache = shutil.which("ccache") if os.environ.get("ADACACHE_CCACHE", "1") != "0" else None
        if ccache:
            settings |= {f"CMAKE_{language}_COMPILER_LAUNCHER": ccache for language in ("CXX", "CUDA")}
        arguments = [f"-D{name}={value}" for name, value in settings.items()]
        arguments += shlex.split(os.environ.get("CMAKE_ARGS", ""))

        # CMake rejects some changes (of compilers or build tools) in an existing cache, so a change deletes
        # the cache. The objects stay: Ninja recompiles only those with a different command line.
        fingerprint = folder / "configured.json"
        facts = json.dumps(
            [
                cmake,
                *arguments,
                {n: os.environ.get(n, "") for n in ("CXX", "CXXFLAGS", "CUDAFLAGS", "CUDAHOSTCXX")},
            ]
        )
        if not fingerprint.exists() or fingerprint.read_text() != facts:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "CMakeCache.txt").unlink(missing_ok=True)
            for stale in (folder / "CMakeFiles").glob("[0-9]*"):
                shutil.rmtree(stale)
        self.call([cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *arguments])
        fingerprint.write_text(facts)

        jobs = int(os.environ.get("MAX_JOBS", "") or os.cpu_count() or 1)
        self.call([cmake, "--build", str(folder), "--parallel", str(jobs)])
        return self.read_compiler(folder)

    def call(self, command: list[str]) -> None:
        try:
            subprocess.run(command, check=True, cwd=ROOT)
        except subprocess.CalledProcessError as error:
            raise BuildError(
                f"{Path(command[0]).name} failed with exit status {error.returncode}; see above"
            ) from None

    @staticmethod
    def read_compiler(folder: Path) -> str:
        for path in (folder / "CMakeFiles").glob("*/CMakeCXXCompiler.cmake"):
            found = dict(re.findall(r'set\(CMAKE_CXX_COMPILER_(ID|VERSION) "([^"]*)"\)', path.read_text()))
            return f"{found.get('ID', 'unknown')} {found.get('VERSION', '')}".strip()
        return "unknown"

    def place(self, libraries: list[Path], info: dict[str, Any]) -> None:
        """Copies the libraries to the package, and removes those of earlier builds."""
        package = self.package_folder()
        package.mkdir(parents=True, exist_ok=True)
        for old in [
            *package.glob("_ops_*.so"),
            *package.glob(f"_engine{sysconfig.get_config_var('EXT_SUFFIX')}"),
        ]:
            old.unlink()  # overwriting a loaded library would crash its process
        for library in libraries:
            shutil.copy2(library, package / library.name)
        (package / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")
        say(f"wrote {', '.join(one.name for one in libraries)} to {os.path.relpath(package, ROOT)}")

    def package_folder(self) -> Path:
        if self.inplace or getattr(self, "editable_mode", False):
            return ROOT / PACKAGE
        return Path(self.build_lib) / PACKAGE

    @staticmethod
    def outputs(cuda: bool) -> list[str]:
        engine = "_engine" + str(sysconfig.get_config_var("EXT_SUFFIX"))
        return ["_ops_cpu.so", *(["_ops_cuda.so"] if cuda else []), engine]

    def get_outputs(self) -> list[str]:
        package = self.package_folder()
        names = [*self.outputs(True), "_build_info.json"]
        return [str(package / name) for name in names if (package / name).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class CleanBuild(build):
    """Deletes build/lib first, so that the wheel has no files of earlier builds."""

    def run(self) -> None:
        if not getattr(self, "editable_mode", False):
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class PurePython(build_py):
    """Excludes the libraries of an in-place build; build_ext adds those of this build."""

    def find_data_files(self, package: str, src_dir: str) -> list[str]:
        files: list[Any] = super().find_data_files(package, src_dir)
        return [f for f in files if not str(f).endswith((".so", "_build_info.json"))]


def readme(repository: str) -> str:
    """README, with links to files of the repository, if its address is known."""
    text = (ROOT / "README.md").read_text()
    if not repository:
        return text

    def absolute(link: re.Match[str]) -> str:
        kind = "raw" if link[1].endswith((".png", ".svg")) else "blob"
        return f"]({repository.rstrip('/')}/{kind}/main/{link[1]})"

    return re.sub(r"\]\((?!https?:|#)([^)\s]+)\)", absolute, text)


def urls(repository: str) -> dict[str, str]:
    address = repository.rstrip("/")
    return {"Repository": address, "Changelog": f"{address}/blob/main/CHANGELOG.md"} if address else {}


if __name__ == "__main__":
    # The address of the repository, so that the links of the package index work; "": they stay relative.
    address = os.environ.get("ADACACHE_REPOSITORY", "")
    setup(
        long_description=readme(address),
        long_description_content_type="text/markdown",
        project_urls=urls(address),
        ext_modules=[Extension(f"{PACKAGE}._engine", sources=[])],  # marks the wheel as platform-specific
        cmdclass={"build": CleanBuild, "build_ext": CMakeBuild, "build_py": PurePython},
    )

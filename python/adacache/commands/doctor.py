# SPDX-License-Identifier: Apache-2.0
"""Versions, the build, and the backend of each op, with the reason why the others are not used."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

import adacache_kernels

PACKAGES = (
    "adacache-kernels",
    "torch",
    "triton",
    "numpy",
    "safetensors",
    "torchmetrics",
    "matplotlib",
    "scikit-learn",
)


def report() -> list[str]:
    """The lines that `adacache doctor` prints."""
    lines = ["Versions", f"  python            {platform.python_version()} on {platform.machine()}"]
    lines += [f"  {name:<17} {_version(name)}" for name in PACKAGES]
    lines += ["", "Device"]
    if torch.version.cuda is None:
        lines.append("  torch is a CPU-only build")
    elif not torch.cuda.is_available():
        lines.append(f"  torch is built with CUDA {torch.version.cuda}, but no GPU is available")
    else:
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            lines.append(f"  cuda:{index}            {torch.cuda.get_device_name(index)}, sm_{major}{minor}")
    lines.append(f"  CPU threads       {torch.get_num_threads()}")
    lines += ["", "Built"]
    info = adacache_kernels.build_info()
    for key in ("torch", "torch_target", "compiler"):
        if key in info:
            lines.append(f"  {key:<17} {info[key]}")
    cuda = info.get("cuda", {})
    for key in ("nvcc", "architectures"):
        if cuda.get(key):
            value = cuda[key]
            lines.append(f"  {key:<17} {', '.join(value) if isinstance(value, list) else value}")
    for name, library in info["libraries"].items():
        lines.append(f"  {name:<17} {'loaded' if library['loaded'] else 'not loaded: ' + library['reason']}")
    lines += ["", "Backends"]
    groups: dict[tuple[str, str, tuple[tuple[str, str], ...]], list[str]] = {}
    for choice in adacache_kernels.backend_report():
        groups.setdefault((choice.device, choice.backend, tuple(choice.others.items())), []).append(choice.op)
    for (device, backend, others), ops in groups.items():
        lines.append(f"  {device} tensors       {backend}: {', '.join(ops)}")
        lines += [f"      not {name:<13} {reason}" for name, reason in others]
    return lines


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"

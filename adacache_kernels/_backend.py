# SPDX-License-Identifier: Apache-2.0
"""Selects the backend of an op by device. `use_backend(...)` or ADACACHE_BACKEND forces one."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from ._libraries import libraries, uncovered_gpu
from ._schemas import OPS as _OPS

__all__ = ["BACKENDS", "OPS", "BackendChoice", "backend_report", "use_backend"]

#: The names of the backends.
BACKENDS = ("cuda", "cpu", "triton", "reference")

#: The names of the ops.
OPS = tuple(_OPS)

DEVICES = ("cpu", "cuda")

_VARIABLE = "ADACACHE_BACKEND"
#: Backends per device, by priority. Other devices use the reference.
_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}


@dataclass(frozen=True)
class BackendChoice:
    """The backend of `op` for tensors on `device`, and for each other backend the reason why it is not
    used."""

    op: str
    device: str
    backend: str
    others: dict[str, str]


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Force a backend in a `with` block: `with adacache_kernels.use_backend("triton"): ...`.

    Applies to this thread or asyncio task; threads started inside do not inherit it. Code compiled with torch
    < 2.14 uses the last `use_backend` of any thread.

    Args:
        backend: "cuda", "cpu" (the compiled libraries), "triton" or "reference" (plain PyTorch).

    Raises:
        ValueError: unknown backend.
        RuntimeError: the backend cannot run here; the message states the reason.
    """
    global _forced_last
    _require(backend, "backend")
    before = _forced.set(backend)
    _forced_last = backend
    try:
        yield
    finally:
        _forced.reset(before)
        _forced_last = _forced.get()


def backend_report() -> list[BackendChoice]:
    """Return for each op and device the backend that is used, and why the others are not."""
    return [_report(op, device) for op in OPS for device in DEVICES]


def choose_backend(device: str, op: str) -> str:
    """Return the backend of `op` for this device type. Hot path: every op calls it."""
    traces = _TRACES_CONTEXT_VARIABLES or not torch.compiler.is_compiling()
    forced = _forced.get() if traces else _forced_last
    if forced is None:
        chosen = _chosen.get((device, op), "reference")
        # torch.compile cannot trace uncovered_gpu().
        if chosen == "cuda" and not torch.compiler.is_compiling() and uncovered_gpu():
            return "triton" if ("triton", device, op) in _runnable else "reference"
        return chosen
    if (forced, device, op) in _runnable or forced == "reference":
        return forced
    if device == "meta":
        return "reference"
    _require(forced, _VARIABLE)
    _require(forced, op, op)
    raise RuntimeError(f"backend: {forced!r} is forced, but does not support tensors on {device!r}")


def _takes(backend: str, device_type: str) -> bool:
    if backend == "triton":
        # The interpreter runs kernels in NumPy; compiled kernels need a GPU.
        return device_type == ("cpu" if _INTERPRETED else "cuda")
    return backend in ("reference", device_type)


def _missing(backend: str, op: str | None = None) -> str | None:
    """Why `backend` cannot run `op` (None: any op) here; None if it can."""
    if backend == "reference":
        return None
    if backend == "triton":
        return None if _HAS_TRITON else "the package triton is not installed"
    if any(_registered(name, backend.upper()) for name in ((op,) if op else OPS)):
        return None
    return libraries()[backend].reason or f"the compiled {backend} library has no kernel for {op or 'any op'}"


def _registered(op: str, key: str) -> bool:
    try:
        return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"adacache::{op}", key))
    except RuntimeError:  # no library is loaded, so there is no schema
        return False


def _require(backend: str, source: str, op: str | None = None) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    reason = _missing(backend, op)
    if reason:
        raise RuntimeError(f"{source}: {backend!r} cannot run here: {reason}")


def _report(op: str, device: str) -> BackendChoice:
    forced = _forced.get()
    if forced is not None and ((forced, device, op) in _runnable or forced == "reference"):
        backend, preferred = forced, f"{forced} is forced"
    else:
        backend = next(name for name in _PREFERENCE[device] if not _out(name, op))
        preferred = f"{backend} has priority"
    others = {}
    for name in BACKENDS:
        if name != backend:
            others[name] = (
                (_out(name, op) or preferred)
                if _takes(name, device)
                else f"does not support {device} tensors"
            )
    return BackendChoice(op, device, backend, others)


def _out(backend: str, op: str) -> str | None:
    """Like `_missing`, but includes the GPUs of this machine."""
    return _missing(backend, op) or (uncovered_gpu() if backend == "cuda" else None)


_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")

libraries()  # registers the schemas and kernels that _runnable depends on

# Computed once at import: what can run on each device, and the default backends.
_runnable = {
    (backend, device, op)
    for backend in BACKENDS
    for device in DEVICES
    for op in OPS
    if _takes(backend, device) and not _missing(backend, op)
}
_chosen = {
    (device, op): next(backend for backend in order if (backend, device, op) in _runnable)
    for device, order in _PREFERENCE.items()
    for op in OPS
}
#: An invalid ADACACHE_BACKEND raises at the first op instead of at import, so that `adacache doctor` can
#: report it.
_forced: ContextVar[str | None] = ContextVar("adacache_backend", default=os.environ.get(_VARIABLE) or None)
#: Dynamo traces ContextVar since torch 2.14. With older versions compiled code reads and guards on a copy.
_TRACES_CONTEXT_VARIABLES = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)
_forced_last: str | None = _forced.get()

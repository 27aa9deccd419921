# SPDX-License-Identifier: Apache-2.0
"""A denoising loop with AdaCache never synchronizes: decisions are copied to pinned memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import adacache
import pytest
import torch
from adacache.models.stdit3 import STDiT3
from models import CODEBOOK, denoise, golden_model, inputs
from torch.utils._python_dispatch import TorchDispatchMode

from adacache_kernels import use_backend

STEPS = 12
POLICY = adacache.AdaCache(
    codebook=CODEBOOK, motion=adacache.MotionRegularization(strides=(1, 2), window=(2, STEPS - 2))
)
#: Ops that return values to the host: each synchronizes.
WAITING = {
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::repeat_interleave.Tensor",
}


class NoWaiting(TorchDispatchMode):
    """Raises on ops that would synchronize, on any device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        masks = [a for a in args[1] if a is not None] if func._schema.name.startswith("aten::index") else []
        if func._schema.name in WAITING or any(
            isinstance(mask, torch.Tensor) and mask.dtype in (torch.bool, torch.uint8) for mask in masks
        ):
            raise RuntimeError(f"{func} synchronizes")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_waiting_on_a_gpu() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def run_loop(model: STDiT3, device: torch.device, videos: int) -> adacache.Handle:
    values = {name: value.to(device) for name, value in inputs(videos, seed=1).items()}
    handle = adacache.enable(model, POLICY, num_steps=STEPS)
    try:
        with handle.request(num_videos=videos):  # the first request loads and compiles
            denoise(model, values, STEPS)
        guard = no_waiting_on_a_gpu() if device.type == "cuda" else NoWaiting()
        with guard, handle.request(num_videos=videos):
            denoise(model, values, STEPS)
        return handle
    finally:
        adacache.disable(model)


@pytest.mark.parametrize("videos", [1, 2])
def test_loop_has_no_synchronizing_ops(videos: int) -> None:
    handle = run_loop(golden_model(), torch.device("cpu"), videos)
    assert 3 < len(handle.trace.computed_steps) < STEPS or videos > 1


@pytest.mark.gpu
@pytest.mark.parametrize("videos", [1, 2])
@pytest.mark.parametrize("backend", ["", "triton"])
def test_loop_does_not_synchronize_on_cuda(backend: str, videos: int) -> None:
    with use_backend(backend) if backend else nullcontext():
        handle = run_loop(golden_model().cuda(), torch.device("cuda"), videos)
    assert handle.trace.measurements


def test_guard_detects_synchronization() -> None:
    x = torch.arange(3.0)
    for waits in (lambda: x[0].item(), lambda: x[x > 1], lambda: bool((x > 1).any()), lambda: x.nonzero()):
        with pytest.raises(RuntimeError, match="synchronizes"), NoWaiting():
            waits()


@pytest.mark.gpu
def test_guard_detects_synchronization_on_cuda() -> None:
    x = torch.arange(3.0, device="cuda")
    for waits in (lambda: x[0].item(), lambda: x[x > 1], lambda: torch.tensor([1.0], device="cuda")):
        with pytest.raises(RuntimeError, match="synchroniz"), no_waiting_on_a_gpu():
            waits()

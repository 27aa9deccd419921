# SPDX-License-Identifier: Apache-2.0
"""A denoising loop on fake CUDA tensors: detects copies and reads that synchronize, without a GPU."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import adacache
import pytest
import torch
from adacache.models.stdit3 import STDiT3, STDiT3Config
from adacache.policies import Action, Plan, Step
from adacache.policies import adacache as adacache_policy
from models import CODEBOOK, denoise, inputs
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode

STEPS = 12
CONFIG = STDiT3Config(
    depth=4, hidden_size=96, num_heads=4, caption_channels=32, model_max_length=12, input_sq_size=512
)
POLICY = adacache.AdaCache(
    codebook=CODEBOOK, motion=adacache.MotionRegularization(strides=(1, 2), window=(2, STEPS - 2))
)
#: Ops that return a value or a data-dependent size to the host.
READS = {
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::_unique2",
    "aten::unique_consecutive",
}


class BlockingCalls(TorchDispatchMode):
    """Lists calls that would synchronize with a CUDA device, with file and line."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name in ("aten::_to_copy", "aten::copy_"):
            source = args[1] if name == "aten::copy_" else args[0]
            to = args[0].device if name == "aten::copy_" else kwargs.get("device") or source.device
            non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            if source.device.type != to.type and not non_blocking:
                self.note(f"{name} from {source.device.type} to {to.type}")
        elif name in READS and args[0].device.type == "cuda":
            self.note(name)
        elif name.startswith("aten::index"):
            indices = args[1] if isinstance(args[1], list | tuple) else ()
            if any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in indices):
                self.note(f"{name} with a mask")
        return func(*args, **kwargs)

    def note(self, what: str) -> None:
        lines = [f for f in traceback.extract_stack() if f.filename != __file__ and "torch" not in f.filename]
        caller = lines[-1]
        self.found.append(f"{what} in {Path(caller.filename).name}:{caller.lineno}")


class NoCopy:
    """Replaces the copy of the decisions to pinned memory, which requires a real stream."""

    def __init__(self, tensor: torch.Tensor) -> None:
        assert tensor.is_cuda


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fake tensors with addresses, as required by the overlap checks."""

    def address(tensor: FakeTensor) -> int:
        return int(tensor.untyped_storage()._cdata) * 2**32 + tensor.storage_offset() * tensor.element_size()

    monkeypatch.setattr(FakeTensor, "data_ptr", address)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)  # requires a real device
    monkeypatch.setattr(adacache_policy, "HostCopy", NoCopy)
    monkeypatch.setattr(adacache_policy.AdaCacheDecider, "records", lambda self: [])
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


@pytest.mark.parametrize("fps", [24.0, None], ids=["fps_number", "fps_default"])
@pytest.mark.parametrize(
    "computed",
    [[{1, 2, 5, 11, 12}], [{1, 2, 5, 11, 12}, {1, 2, 3, 7, 11, 12}]],
    ids=["one_video", "two_separate_videos"],
)
def test_loop_does_not_synchronize(
    fake_cuda: None, monkeypatch: pytest.MonkeyPatch, computed: list[set[int]], fps: float | None
) -> None:
    def plan(self: Any, step: Step) -> Plan:
        return Plan({self._stack: [Action(step.number not in steps) for steps in computed]})

    monkeypatch.setattr(adacache_policy.AdaCacheDecider, "plan", plan)
    decisions = counted(monkeypatch, adacache_policy.AdaCacheDecider, "observe")
    with torch.device("cuda"):
        model = STDiT3(CONFIG)
    values = {name: value.to("cuda") for name, value in inputs(len(computed)).items()}
    handle = adacache.enable(model, POLICY, num_steps=STEPS)
    with handle.request(num_videos=len(computed)), BlockingCalls() as blocking:
        z = denoise(model, values, STEPS, fps=fps)
    assert z.device.type == "cuda"
    assert len(decisions) == len(set.union(*computed))
    assert blocking.found == []


@pytest.mark.parametrize(
    ("found", "call"),
    [
        ("aten::_to_copy from cpu to cuda", lambda x: torch.as_tensor(24.0, device="cuda")),
        ("aten::_to_copy from cuda to cpu", lambda x: x.cpu()),
        ("aten::copy_ from cpu to cuda", lambda x: x.copy_(torch.ones(3))),
        ("aten::_local_scalar_dense", lambda x: x[0].item()),
        ("aten::nonzero", lambda x: x.nonzero()),
        ("aten::index with a mask", lambda x: x[x > 1]),
    ],
)
def test_blocking_call_is_detected(fake_cuda: None, found: str, call: Callable[[torch.Tensor], Any]) -> None:
    x = torch.ones(3, device="cuda")
    with suppress(DataDependentOutputException, DynamicOutputShapeException), BlockingCalls() as blocking:
        call(x)
    assert [one.partition(" in ")[0] for one in blocking.found][:1] == [found]


def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Any]:
    """Records the arguments of each call of a method; the method still runs."""
    calls: list[Any] = []
    method = getattr(owner, name)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return method(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, call)
    return calls

"""Where the fused `linear_gated_residual_meter` was measured to be faster than its two parts."""

from __future__ import annotations

import json
from pathlib import Path

import torch

#: By device name, dtype ("bfloat16") and size ("K1152 C1152 S2048", `size_class`): the time of linear layer
#: and meter over that of the fused kernel. `benchmarks/linear_gated_residual_meter.py --write` fills it.
TABLE = Path(__file__).parents[1] / "linear_gated_residual_meter.json"
_MEASURED: dict[str, dict[str, dict[str, float]]] = json.loads(TABLE.read_text())


def fused_is_faster(a: torch.Tensor, weight: torch.Tensor, frames: int) -> bool:
    """Whether the table says so for this device, dtype and size; False where nothing was measured."""
    if not _MEASURED:
        return False
    places = a.shape[0] * (a.shape[1] // max(frames, 1))
    by_size = _MEASURED.get(_device_name(a.device), {}).get(str(a.dtype).removeprefix("torch."), {})
    return by_size.get(size_class(a.shape[2], weight.shape[0], places), 0.0) > 1.0


def size_class(inner: int, channels: int, places: int) -> str:
    """The sizes that one measurement stands for: with the places of all rows rounded up to a power of two.
    Frames don't count, since a program takes one after the other."""
    return f"K{inner} C{channels} S{1 << max(places - 1, 0).bit_length()}"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

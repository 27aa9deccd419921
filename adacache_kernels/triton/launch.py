"""How the Triton kernels are laid over a tensor, and on which device they are launched."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton

NUM_WARPS = 4


@dataclass(frozen=True)
class Tiling:
    """One program covers `places` x `channels` positions; `blocks` programs cover a row (or a frame of
    it)."""

    places: int
    channels: int
    blocks: int


def tiling(places: int, channels: int, elements_per_thread: int) -> Tiling:
    """Tile a [places, channels] plane so that each thread holds `elements_per_thread` elements of each
    tensor."""
    elements = NUM_WARPS * 32 * elements_per_thread
    # 256 divides the widths of today's models; narrower models get the next power of two above theirs.
    block_channels = min(triton.next_power_of_2(max(channels, 1)), 256 if channels % 256 == 0 else 128)
    block_places = max(1, elements // block_channels)
    return Tiling(
        block_places,
        block_channels,
        triton.cdiv(places, block_places) * triton.cdiv(channels, block_channels),
    )


def meter_tiling(
    places: int, channels: int, strides: Sequence[int], squares: bool, element_size: int, aligned: bool
) -> Tiling:
    """Tile for a meter: 16 bytes a thread where its sums fit into registers beside them, else fewer."""
    columns = (7 if squares else 3) + 2 * len(strides)
    if columns <= 5 and aligned:
        return tiling(places, channels, 16 // element_size)
    return tiling(places, channels, 4 if columns <= 13 else 2 if aligned else 1)


def aligned(*tensors: torch.Tensor) -> bool:
    """Whether every access to these tensors can be as wide as the widest."""
    return all(
        tensor.data_ptr() % 16 == 0 and tensor.stride(0) % 16 == 0 and tensor.stride(1) % 16 == 0
        for tensor in tensors
    )


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()

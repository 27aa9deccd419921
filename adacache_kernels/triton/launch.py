# SPDX-License-Identifier: Apache-2.0
"""Tiling of the Triton kernels, and the device of a launch."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton

from .._choices import NORMS, ROUNDINGS

NUM_WARPS = 4
#: Elements of one tensor per thread if a program processes whole tokens; more would spill.
WHOLE_TOKEN_ELEMENTS = 40


@dataclass(frozen=True)
class Tiling:
    """A program covers `places` tokens with `chunks` * `channels` channels each; `blocks` programs cover a
    row (or a frame of it).

    A thread has `vector` contiguous channels; if 1, it has places instead.
    """

    places: int
    channels: int
    chunks: int
    blocks: int
    warps: int
    vector: int


def tiling(
    places: int, channels: int, element_size: int, *, aligned: bool = True, vectors: int = 1
) -> Tiling:
    """Tile [places, channels] so that each thread has `vectors` * 16 bytes of each tensor."""
    vector = 16 // element_size
    elements = NUM_WARPS * 32 * vector * vectors
    # 256 divides the widths of common models. Narrower models use the next power of two, except for accesses
    # of one element, where threads are consecutive along the channels.
    widest = 256 if channels % 256 == 0 else 128
    block_channels = max(min(triton.next_power_of_2(max(channels, 1)), widest), vector) if aligned else widest
    block_places = elements // block_channels
    blocks = triton.cdiv(places, block_places) * triton.cdiv(channels, block_channels)
    return Tiling(block_places, block_channels, 1, blocks, NUM_WARPS, vector if aligned else 1)


def whole_token_tiling(places: int, channels: int, element_size: int, *, aligned: bool) -> Tiling:
    """Tile so that a program has all channels of its tokens, for norms and float8 scales.

    The channel tiling is the same in every op, so that norms sum in the same order. The channels of a token
    are in one warp if they fit, because a reduction within a warp needs no barrier.
    """
    vector = 16 // element_size
    channels = max(channels, 1)
    warps_of_token = 1
    while channels > warps_of_token * 32 * WHOLE_TOKEN_ELEMENTS and warps_of_token < 16:
        warps_of_token *= 2
    block_channels = min(warps_of_token * 32 * vector, max(triton.next_power_of_2(channels), vector))
    warps = max(warps_of_token, NUM_WARPS)
    block_places = warps * 32 * vector // block_channels
    return Tiling(
        block_places,
        block_channels,
        triton.cdiv(channels, block_channels),
        triton.cdiv(places, block_places),
        warps,
        vector if aligned else 1,
    )


def aligned(*tensors: torch.Tensor | None) -> bool:
    """Whether pointers and strides of these tensors allow 16-byte accesses."""
    return all(
        tensor is None
        or (tensor.data_ptr() % 16 == 0 and tensor.stride(0) % 16 == 0 and tensor.stride(1) % 16 == 0)
        for tensor in tensors
    )


#: Granularity of a modulator (gate, shift, scale).
SHARED, PER_FRAME, PER_TOKEN = 0, 1, 2


@dataclass(frozen=True)
class Modulator:
    """Layout of a modulator: granularity, row stride, and stride per frame or token."""

    per: int
    row: int
    step: int


def modulator(tensor: torch.Tensor | None, frames: int, tokens: int) -> Modulator:
    if tensor is None:
        return Modulator(SHARED, 0, 0)
    groups, step = tensor.shape[1], tensor.stride(1)
    if groups == 1 or step == 0:
        return Modulator(SHARED, tensor.stride(0), 0)
    return Modulator(PER_FRAME if groups == frames else PER_TOKEN, tensor.stride(0), step)


def frames_of(*modulators: torch.Tensor | None, tokens: int) -> int:
    """The number of frames (groups of tokens) of the modulators; 1 if they have none."""
    return max(
        (tensor.shape[1] for tensor in modulators if tensor is not None and tensor.shape[1] < tokens),
        default=1,
    )


class Norm(NamedTuple):
    """The output and the arguments of a norm. out_scale: of an output in float8, which is passed as uint8."""

    out: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    shift_table: torch.Tensor | None = None
    scale_table: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    eps: float = 0.0
    kind: int = NORMS["layer"]
    out_scale: torch.Tensor | None = None


def rounds_once(rounding: int, x: torch.Tensor) -> bool:
    """Whether only the sum x + gate*y is rounded; in float32 both roundings give equal bits."""
    return rounding == ROUNDINGS["float32"] and x.dtype != torch.float32


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the device of the tensor current, because Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()

"""The sums of two residuals that the caller holds, in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..columns import METRICS
from .launch import aligned, on_device, tiling
from .sums import add_sums, combine_sums, measure, measure_motion, no_sums, store_sums


@triton.jit
def residual_meter_kernel(
    residual,
    old_residual,
    partial,  # [columns, rows, blocks] float64
    frames,
    places,
    channels,
    residual_row,
    residual_token,
    old_row,
    old_token,
    STRIDES: tl.constexpr,
    SQUARES: tl.constexpr,
    BLOCK_PLACES: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    channel_blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    place = (block // channel_blocks * BLOCK_PLACES + tl.arange(0, BLOCK_PLACES)).to(tl.int64)[:, None]
    channel = (block % channel_blocks * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS))[None, :]
    mask = (place < places) & (channel < channels)

    residual_frame = tl.full([], places, tl.int64) * residual_token
    old_frame = tl.full([], places, tl.int64) * old_token
    residual_at = place * residual_token + channel
    old_at = place * old_token + channel
    residual += row * residual_row
    old_residual += row * old_row

    before = tl.zeros([BLOCK_PLACES, BLOCK_CHANNELS], dtype=residual.dtype.element_ty)
    sums = no_sums(BLOCK_PLACES, BLOCK_CHANNELS, STRIDES, SQUARES, VECTOR)
    for frame in range(frames):
        old = tl.load(old_residual + old_at, mask=mask, other=0.0).to(tl.float32)
        loaded = tl.load(residual + residual_at, mask=mask, other=0.0)
        new = loaded.to(tl.float32)
        measured = measure(new, old, SQUARES, VECTOR)
        for index in tl.static_range(len(STRIDES)):
            paired = frame >= STRIDES[index]
            if STRIDES[index] == 1:
                earlier = before
            else:
                earlier = tl.load(
                    residual + residual_at - STRIDES[index] * residual_frame, mask=mask & paired, other=0.0
                )
            measured = measured + measure_motion(new, earlier.to(tl.float32), paired, VECTOR)
        sums = add_sums(sums, measured)
        before = loaded
        residual += residual_frame
        old_residual += old_frame
    store_sums(partial, sums, True, row, tl.num_programs(1), block, tl.num_programs(0), SQUARES)


def residual_meter(
    residual: torch.Tensor,
    old: torch.Tensor,
    video_of_row: torch.Tensor | None,
    num_videos: int,
    frames: int,
    strides: Sequence[int],
    metric: int,
) -> torch.Tensor:
    """Launch; returns the sums."""
    rows, tokens, channels = residual.shape
    places = tokens // frames
    squares = metric != METRICS["l1"]
    tile = tiling(places, channels, residual.element_size(), aligned=aligned(residual, old))
    blocks = tile.blocks if residual.numel() else 0
    partial = torch.empty((7 + 2 * len(strides), rows, blocks), dtype=torch.float64, device=residual.device)
    with on_device(residual):
        if blocks:
            residual_meter_kernel[(blocks, rows)](
                residual,
                old,
                partial,
                frames,
                places,
                channels,
                residual.stride(0),
                residual.stride(1),
                old.stride(0),
                old.stride(1),
                STRIDES=tuple(strides),
                SQUARES=squares,
                BLOCK_PLACES=tile.places,
                BLOCK_CHANNELS=tile.channels,
                VECTOR=tile.vector,
                num_warps=tile.warps,
                enable_fp_fusion=False,
            )
        return combine_sums(partial, video_of_row, num_videos, squares=squares)

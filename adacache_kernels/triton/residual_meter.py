"""The sums of two residuals that the caller holds, in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..columns import METRICS
from .launch import NUM_WARPS, aligned, meter_tiling, on_device
from .sums import FRAMES_PER_RUN, combine_sums


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

    zeros = tl.zeros([BLOCK_PLACES, BLOCK_CHANNELS], dtype=tl.float32)
    before = zeros
    totals = ()
    for column in tl.static_range(7 + 2 * len(STRIDES)):
        totals = totals + (tl.full([], 0.0, tl.float64),)

    for start in range(0, frames, FRAMES_PER_RUN):
        abs_diff = zeros
        abs_old = zeros
        abs_new = zeros
        sq_diff = zeros
        sq_old = zeros
        sq_new = zeros
        dot = zeros
        motion = ()
        for column in tl.static_range(2 * len(STRIDES)):
            motion = motion + (zeros,)
        for frame in range(start, tl.minimum(start + FRAMES_PER_RUN, frames)):
            old = tl.load(old_residual + old_at, mask=mask, other=0.0).to(tl.float32)
            new = tl.load(residual + residual_at, mask=mask, other=0.0).to(tl.float32)
            diff = new - old
            abs_diff += tl.abs(diff)
            abs_old += tl.abs(old)
            abs_new += tl.abs(new)
            if SQUARES:
                sq_diff += diff * diff
                sq_old += old * old
                sq_new += new * new
                dot += new * old
            counted = ()
            for index in tl.static_range(len(STRIDES)):
                paired = frame >= STRIDES[index]
                if STRIDES[index] == 1:
                    earlier = before
                else:
                    earlier = tl.load(
                        residual + residual_at - STRIDES[index] * residual_frame,
                        mask=mask & paired,
                        other=0.0,
                    ).to(tl.float32)
                counted = counted + (
                    motion[2 * index] + tl.where(paired, tl.abs(new - earlier), 0.0),
                    motion[2 * index + 1] + tl.where(paired, tl.abs(new) + tl.abs(earlier), 0.0),
                )
            motion = counted
            before = new
            residual += residual_frame
            old_residual += old_frame

        run = (abs_diff, abs_old, abs_new, sq_diff, sq_old, sq_new, dot) + motion
        grown = ()
        for column in tl.static_range(7 + 2 * len(STRIDES)):
            if SQUARES or column < 3 or column >= 7:
                grown = grown + (totals[column] + tl.sum(run[column].to(tl.float64)),)
            else:
                grown = grown + (totals[column],)
        totals = grown

    blocks = tl.num_programs(0)
    rows = tl.num_programs(1)
    for column in tl.static_range(7 + 2 * len(STRIDES)):
        if SQUARES or column < 3 or column >= 7:
            tl.store(partial + (column * rows + row) * blocks + block, totals[column])


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
    tile = meter_tiling(places, channels, strides, squares, residual.element_size(), aligned(residual, old))
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
                num_warps=NUM_WARPS,
                enable_fp_fusion=False,
            )
        return combine_sums(partial, video_of_row, num_videos, squares=squares)

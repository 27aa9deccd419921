"""x + gate*y, gate*y over the old residual, and the sums of both residuals, in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..columns import METRICS
from .launch import NUM_WARPS, aligned, meter_tiling, on_device
from .numeric import round_to
from .sums import FRAMES_PER_RUN, combine_sums


@triton.jit
def gated_residual_meter_kernel(
    x,
    y,
    gate,
    residual,
    out,
    partial,  # [columns, rows, blocks] float64
    frames,
    places,
    channels,
    x_row,
    x_token,
    y_row,
    y_token,
    gate_row,
    gate_frame,
    gate_place,
    residual_row,
    residual_token,
    out_row,
    out_token,
    STRIDES: tl.constexpr,
    SQUARES: tl.constexpr,
    GATE_PER_FRAME: tl.constexpr,
    BARRIER: tl.constexpr,
    BLOCK_PLACES: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    # A program stays on its places and walks over the frames, so that the frames of a motion pair meet in its
    # registers.
    dtype: tl.constexpr = residual.dtype.element_ty
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    channel_blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    place = (block // channel_blocks * BLOCK_PLACES + tl.arange(0, BLOCK_PLACES)).to(tl.int64)[:, None]
    channel = (block % channel_blocks * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS))[None, :]
    mask = (place < places) & (channel < channels)

    x_frame = tl.full([], places, tl.int64) * x_token
    y_frame = tl.full([], places, tl.int64) * y_token
    residual_frame = tl.full([], places, tl.int64) * residual_token
    out_frame = tl.full([], places, tl.int64) * out_token
    x_at = place * x_token + channel
    y_at = place * y_token + channel
    gate_at = place * gate_place + channel
    residual_at = place * residual_token + channel
    out_at = place * out_token + channel
    x += row * x_row
    y += row * y_row
    gate += row * gate_row
    residual += row * residual_row
    out += row * out_row

    zeros = tl.zeros([BLOCK_PLACES, BLOCK_CHANNELS], dtype=tl.float32)
    factor = zeros
    if not GATE_PER_FRAME:
        factor = tl.load(gate + gate_at, mask=mask, other=0.0).to(tl.float32)
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
            old = tl.load(residual + residual_at, mask=mask, other=0.0).to(tl.float32)
            if GATE_PER_FRAME:
                factor = tl.load(gate + gate_at, mask=mask, other=0.0).to(tl.float32)
            rounded = round_to(factor * tl.load(y + y_at, mask=mask, other=0.0).to(tl.float32), dtype)
            new = rounded.to(tl.float32)
            stream = tl.load(x + x_at, mask=mask, other=0.0).to(tl.float32)
            if BARRIER:
                # Loads and stores of different widths give an element to different threads: none may write
                # what another has still to read.
                tl.debug_barrier()
            tl.store(residual + residual_at, rounded, mask=mask)
            tl.store(out + out_at, round_to(stream + new, dtype), mask=mask)

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
                    # y again (mostly from L2) and not the residual: what other threads of this program have
                    # stored is not sure to be seen.
                    earlier_factor = factor
                    if GATE_PER_FRAME:
                        earlier_factor = tl.load(
                            gate + gate_at - STRIDES[index] * gate_frame, mask=mask & paired, other=0.0
                        ).to(tl.float32)
                    earlier_y = tl.load(
                        y + y_at - STRIDES[index] * y_frame, mask=mask & paired, other=0.0
                    ).to(tl.float32)
                    earlier = round_to(earlier_factor * earlier_y, dtype).to(tl.float32)
                counted = counted + (
                    motion[2 * index] + tl.where(paired, tl.abs(new - earlier), 0.0),
                    motion[2 * index + 1] + tl.where(paired, tl.abs(new) + tl.abs(earlier), 0.0),
                )
            motion = counted
            before = new
            x += x_frame
            y += y_frame
            gate += gate_frame
            residual += residual_frame
            out += out_frame

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


def gated_residual_meter(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor,
    residual: torch.Tensor,
    video_of_row: torch.Tensor | None,
    num_videos: int,
    frames: int,
    strides: Sequence[int],
    metric: int,
    out: torch.Tensor,
) -> torch.Tensor:
    """Launch; returns the sums."""
    rows, tokens, channels = x.shape
    places = tokens // frames
    squares = metric != METRICS["l1"]
    fit = aligned(x, y, gate, residual, out)
    tile = meter_tiling(places, channels, strides, squares, x.element_size(), fit)
    blocks = tile.blocks if x.numel() else 0
    per_token, per_frame = gate.shape[1] == tokens, gate.shape[1] == frames
    gate_place = gate.stride(1) if per_token and not (per_frame and places == 1) else 0
    gate_frame = gate_place * places if gate_place else (gate.stride(1) if per_frame and frames > 1 else 0)
    partial = torch.empty((7 + 2 * len(strides), rows, blocks), dtype=torch.float64, device=x.device)
    with on_device(x):
        if blocks:
            gated_residual_meter_kernel[(blocks, rows)](
                x,
                y,
                gate,
                residual,
                out,
                partial,
                frames,
                places,
                channels,
                x.stride(0),
                x.stride(1),
                y.stride(0),
                y.stride(1),
                gate.stride(0),
                gate_frame,
                gate_place,
                residual.stride(0),
                residual.stride(1),
                out.stride(0),
                out.stride(1),
                STRIDES=tuple(strides),
                SQUARES=squares,
                GATE_PER_FRAME=gate_frame != 0,
                BARRIER=not fit,
                BLOCK_PLACES=tile.places,
                BLOCK_CHANNELS=tile.channels,
                num_warps=NUM_WARPS,
                enable_fp_fusion=False,  # eager PyTorch rounds gate*y before it adds
            )
        return combine_sums(partial, video_of_row, num_videos, squares=squares)

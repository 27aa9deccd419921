"""x_out - x_in over the old residual, and the sums of both residuals, in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..columns import METRICS
from .launch import aligned, on_device, tiling, whole_token_tiling
from .numeric import round_to
from .sums import add_sums, combine_sums, measure, measure_motion, no_sums, store_sums
from .tokens import kept, row_of, store_float8


@triton.jit
def stack_residual_meter_kernel(
    x_out,
    x_in,
    residual,
    residual_scale,
    index,  # the rows of x_in, residual and out
    out,  # None, or where x_out is put
    partial,  # [columns, rows, blocks] float64
    frames,
    places,
    channels,
    total,
    x_out_row,
    x_out_token,
    x_in_row,
    x_in_token,
    residual_row,
    residual_token,
    residual_scale_row,
    residual_scale_token,
    out_row,
    out_token,
    STRIDES: tl.constexpr,
    SQUARES: tl.constexpr,
    LATE: tl.constexpr,  # x_in is needed again before x_out may be put there
    BARRIER: tl.constexpr,
    BLOCK_PLACES: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    CHUNKS: tl.constexpr,  # float8 needs all channels of a token
    VECTOR: tl.constexpr,
):
    # A program stays on its places and walks over the frames, so that the frames of a motion pair meet in its
    # registers.
    dtype: tl.constexpr = x_in.dtype.element_ty
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    channel_blocks = tl.cdiv(channels, BLOCK_CHANNELS * CHUNKS)
    place = (block // channel_blocks * BLOCK_PLACES + tl.arange(0, BLOCK_PLACES)).to(tl.int64)[:, None]
    channel = (block % channel_blocks * (BLOCK_CHANNELS * CHUNKS) + tl.arange(0, BLOCK_CHANNELS))[None, :]
    picked = row_of(index, row, total)
    exists = picked >= 0
    present = place < places
    if index is not None:
        # A limit: the interpreter cannot broadcast a scalar mask.
        present = place < tl.where(exists, places, 0)

    x_out_frame = tl.full([], places, tl.int64) * x_out_token
    x_in_frame = tl.full([], places, tl.int64) * x_in_token
    residual_frame = tl.full([], places, tl.int64) * residual_token
    residual_scale_frame = tl.full([], places, tl.int64) * residual_scale_token
    out_frame = tl.full([], places, tl.int64) * out_token
    x_out_at = place * x_out_token + channel
    x_in_at = place * x_in_token + channel
    residual_at = place * residual_token + channel
    residual_scale_at = place * residual_scale_token
    out_at = place * out_token + channel
    x_out += row * x_out_row
    x_in += picked * x_in_row
    residual += picked * residual_row
    if residual_scale is not None:
        residual_scale += picked * residual_scale_row
    if out is not None:
        out += picked * out_row
    first_x_out = x_out

    before = ()
    for chunk in tl.static_range(CHUNKS):
        before = before + (tl.zeros([BLOCK_PLACES, BLOCK_CHANNELS], dtype=dtype),)
    sums = no_sums(BLOCK_PLACES, BLOCK_CHANNELS, STRIDES, SQUARES, VECTOR)

    for frame in range(frames):
        old_scale = None
        if residual_scale is not None:
            old_scale = tl.load(residual_scale + residual_scale_at, mask=present, other=1.0)
        # All that is read of a frame is on its way before the first of it is used or written.
        stored = ()
        afters = ()
        befores = ()
        for chunk in tl.static_range(CHUNKS):
            start = chunk * BLOCK_CHANNELS
            mask = present & (channel + start < channels)
            stored = stored + (tl.load(residual + residual_at + start, mask=mask, other=0),)
            afters = afters + (tl.load(x_out + x_out_at + start, mask=mask, other=0.0),)
            befores = befores + (tl.load(x_in + x_in_at + start, mask=mask, other=0.0),)
        if BARRIER:
            # Loads and stores of different widths give an element to different threads: none may write what
            # another has still to read.
            tl.debug_barrier()
        residuals = ()
        measured_chunks = ()
        for chunk in tl.static_range(CHUNKS):
            start = chunk * BLOCK_CHANNELS
            mask = present & (channel + start < channels)
            rounded = round_to(afters[chunk].to(tl.float32) - befores[chunk].to(tl.float32), dtype)
            if residual_scale is None:
                tl.store(residual + residual_at + start, rounded, mask=mask)
            if out is not None and not LATE:
                tl.store(out + out_at + start, afters[chunk], mask=mask)
            residuals = residuals + (rounded,)

            new = rounded.to(tl.float32)
            measured = measure(new, kept(stored[chunk], old_scale), SQUARES, VECTOR)
            for number in tl.static_range(len(STRIDES)):
                paired = frame >= STRIDES[number]
                if STRIDES[number] == 1:
                    earlier = before[chunk]
                else:
                    # The two again (mostly from L2) and not the residual: what other threads of this program
                    # have stored is not sure to be seen, and float8 has lost some of it.
                    earlier_after = tl.load(
                        x_out + x_out_at + start - STRIDES[number] * x_out_frame,
                        mask=mask & paired,
                        other=0.0,
                    )
                    earlier_before = tl.load(
                        x_in + x_in_at + start - STRIDES[number] * x_in_frame, mask=mask & paired, other=0.0
                    )
                    earlier = round_to(earlier_after.to(tl.float32) - earlier_before.to(tl.float32), dtype)
                measured = measured + measure_motion(new, earlier.to(tl.float32), paired, VECTOR)
            if chunk == 0:
                measured_chunks = measured
            else:
                measured_chunks = add_sums(measured_chunks, measured)
        sums = add_sums(sums, measured_chunks)
        before = residuals
        if residual_scale is not None:
            store_float8(
                residual,
                residual_at,
                residual_scale,
                residual_scale_at,
                residuals,
                channel,
                channels,
                present,
                BLOCK_CHANNELS,
            )
            residual_scale += residual_scale_frame
        x_out += x_out_frame
        x_in += x_in_frame
        residual += residual_frame
        if out is not None and not LATE:
            out += out_frame
    if LATE:
        if BARRIER:
            tl.debug_barrier()
        for frame in range(frames):
            for chunk in tl.static_range(CHUNKS):
                start = chunk * BLOCK_CHANNELS
                mask = present & (channel + start < channels)
                after = tl.load(first_x_out + x_out_at + start, mask=mask, other=0.0)
                tl.store(out + out_at + start, after, mask=mask)
            first_x_out += x_out_frame
            out += out_frame
    store_sums(partial, sums, exists, row, tl.num_programs(1), block, tl.num_programs(0), SQUARES)


def stack_residual_meter(
    x_out: torch.Tensor,
    x_in: torch.Tensor,
    residual: torch.Tensor,
    residual_scale: torch.Tensor | None,
    rows: torch.Tensor | None,
    video_of_row: torch.Tensor | None,
    num_videos: int,
    frames: int,
    strides: Sequence[int],
    metric: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Launch; returns the sums."""
    batch, tokens, channels = x_out.shape
    places = tokens // frames
    squares = metric != METRICS["l1"]
    fit = aligned(x_out, x_in, residual, out)
    tile = (tiling if residual_scale is None else whole_token_tiling)(
        places, channels, x_out.element_size(), aligned=fit
    )
    blocks = tile.blocks if x_out.numel() else 0
    in_place = out is not None and out.data_ptr() == x_in.data_ptr()
    partial = torch.empty((7 + 2 * len(strides), batch, blocks), dtype=torch.float64, device=x_out.device)
    with on_device(x_out):
        if blocks:
            stack_residual_meter_kernel[(blocks, batch)](
                x_out,
                x_in,
                residual if residual_scale is None else residual.view(torch.uint8),
                residual_scale,
                rows,
                out,
                partial,
                frames,
                places,
                channels,
                x_in.shape[0],
                x_out.stride(0),
                x_out.stride(1),
                x_in.stride(0),
                x_in.stride(1),
                residual.stride(0),
                residual.stride(1),
                *(residual_scale.stride() if residual_scale is not None else (0, 0)),
                *(out.stride()[:2] if out is not None else (0, 0)),
                STRIDES=tuple(strides),
                SQUARES=squares,
                LATE=in_place and any(stride != 1 for stride in strides),
                BARRIER=not fit,
                BLOCK_PLACES=tile.places,
                BLOCK_CHANNELS=tile.channels,
                CHUNKS=tile.chunks,
                VECTOR=tile.vector,
                num_warps=tile.warps,
                enable_fp_fusion=False,
            )
        return combine_sums(partial, video_of_row, num_videos, squares=squares)

# SPDX-License-Identifier: Apache-2.0
"""The metered ops: sums of a residual and the old one and, in the same pass, the new stream and its norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .._choices import NORMS, ROUNDINGS
from ..columns import METRICS
from .launch import (
    SHARED,
    Norm,
    Tiling,
    aligned,
    modulator,
    on_device,
    rounds_once,
    tiling,
    whole_token_tiling,
)
from .norm import store_norm
from .numeric import round_to
from .sums import add_sums, combine_sums, measure, measure_motion, no_sums, store_sums
from .tokens import gated, kept, load_modulator, product, row_of, store_float8

#: The residual r. GATED: r = gate * y, out = x + r. STACK: r = y - x, out = y or None. PAIR: r = y, no
#: outputs.
GATED, STACK, PAIR = 0, 1, 2

_SHARED = tl.constexpr(SHARED)
_GATED = tl.constexpr(GATED)
_STACK = tl.constexpr(STACK)
_PAIR = tl.constexpr(PAIR)


@triton.jit(do_not_specialize=["blocks"])
def meter_kernel(
    x,
    y,
    gate,
    residual,
    residual_scale,
    x_rows,  # STACK: also the rows of residual and out
    residual_rows,
    shift,
    scale,
    gate_table,
    shift_table,
    scale_table,
    weight,
    bias,
    out,
    norm_out,  # None: no norm
    partial,  # [columns, rows, blocks] float64
    blocks,
    frames,
    places,
    channels,
    x_total,
    residual_total,
    eps,
    x_row,
    x_token,
    y_row,
    y_token,
    gate_row,
    gate_step,
    residual_row,
    residual_token,
    residual_scale_row,
    residual_scale_token,
    shift_row,
    shift_step,
    scale_row,
    scale_step,
    out_row,
    out_token,
    norm_row,
    norm_token,
    SOURCE: tl.constexpr,
    STRIDES: tl.constexpr,
    SQUARES: tl.constexpr,
    GATE: tl.constexpr,
    SHIFT: tl.constexpr,
    SCALE: tl.constexpr,
    ROUNDS_ONCE: tl.constexpr,
    RMS: tl.constexpr,
    LATE: tl.constexpr,  # STACK: write `out` after the loop, because it is x, which is read again
    BARRIER: tl.constexpr,
    BLOCK_PLACES: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    CHUNKS: tl.constexpr,  # > 1: a norm and float8 need all channels of a token
    VECTOR: tl.constexpr,
):
    # A program loops over the frames of its places, so that both frames of a motion pair are in registers.
    dtype: tl.constexpr = y.dtype.element_ty
    INDEXED: tl.constexpr = x_rows is not None or residual_rows is not None
    block = tl.program_id(0) % blocks
    row = (tl.program_id(0) // blocks).to(tl.int64)
    channel_blocks = tl.cdiv(channels, BLOCK_CHANNELS * CHUNKS)
    place = (block // channel_blocks * BLOCK_PLACES + tl.arange(0, BLOCK_PLACES)).to(tl.int64)[:, None]
    channel = (block % channel_blocks * (BLOCK_CHANNELS * CHUNKS) + tl.arange(0, BLOCK_CHANNELS))[None, :]
    row_of_x = row_of(x_rows, row, x_total)
    if SOURCE == _STACK:
        row_of_residual = row_of_x
        row_of_out = row_of_x
    else:
        row_of_residual = row_of(residual_rows, row, residual_total)
        row_of_out = row
    exists = (row_of_x >= 0) & (row_of_residual >= 0)
    written = place < places
    present = written
    if INDEXED:
        # Not a scalar mask: the interpreter cannot broadcast it.
        present = place < tl.where(exists, places, 0)

    y_frame = tl.full([], places, tl.int64) * y_token
    residual_frame = tl.full([], places, tl.int64) * residual_token
    y_at = place * y_token + channel
    residual_at = place * residual_token + channel
    y += row * y_row
    first_y = y
    residual += row_of_residual * residual_row
    if x is not None:
        x_frame = tl.full([], places, tl.int64) * x_token
        x_at = place * x_token + channel
        x += row_of_x * x_row
    if out is not None:
        out_frame = tl.full([], places, tl.int64) * out_token
        out_at = place * out_token + channel
        out += row_of_out * out_row
    if residual_scale is not None:
        residual_scale_frame = tl.full([], places, tl.int64) * residual_scale_token
        residual_scale_at = place * residual_scale_token
        residual_scale += row_of_residual * residual_scale_row
    if gate is not None:
        gate += row * gate_row
    if shift is not None:
        shift += row * shift_row
    if scale is not None:
        scale += row * scale_row
    if norm_out is not None:
        norm_frame = tl.full([], places, tl.int64) * norm_token
        norm_at = place * norm_token + channel
        norm_out += row * norm_row

    # A gate per row stays in registers if it fits one tile.
    ONE_FACTOR: tl.constexpr = gate is not None and GATE == _SHARED and CHUNKS == 1
    one_factor = None
    if ONE_FACTOR:
        one_factor = load_modulator(
            gate, gate_table, gate_step, 0, place, channel, present & (channel < channels), GATE
        )
    before = ()
    for chunk in tl.static_range(CHUNKS):
        before = before + (tl.zeros([BLOCK_PLACES, BLOCK_CHANNELS], dtype=dtype),)
    sums = no_sums(BLOCK_PLACES, BLOCK_CHANNELS, STRIDES, SQUARES, VECTOR)

    for frame in range(frames):
        token = place + frame * tl.full([], places, tl.int64)
        old_scale = None
        if residual_scale is not None:
            old_scale = tl.load(residual_scale + residual_scale_at, mask=present, other=1.0)
        # All loads of a frame are issued before the first use or store.
        stored = ()
        ys = ()
        xs = ()
        for chunk in tl.static_range(CHUNKS):
            start = chunk * BLOCK_CHANNELS
            mask = present & (channel + start < channels)
            stored = stored + (tl.load(residual + residual_at + start, mask=mask, other=0),)
            ys = ys + (tl.load(y + y_at + start, mask=mask, other=0.0),)
            if x is not None:
                xs = xs + (tl.load(x + x_at + start, mask=mask, other=0.0),)
        if BARRIER:
            # Loads and stores of different widths assign an element to different threads; all loads must
            # finish before the first store.
            tl.debug_barrier()
        residuals = ()
        streams = ()
        measured_chunks = ()
        for chunk in tl.static_range(CHUNKS):
            start = chunk * BLOCK_CHANNELS
            here = channel + start
            inside = here < channels
            mask = present & inside
            factor = one_factor
            if gate is not None and not ONE_FACTOR:
                factor = load_modulator(gate, gate_table, gate_step, frame, token, here, mask, GATE)
            if SOURCE == _STACK:
                rounded = round_to(ys[chunk].to(tl.float32) - xs[chunk].to(tl.float32), dtype)
            else:
                rounded = gated(ys[chunk], factor, dtype)
            new = rounded.to(tl.float32)
            if SOURCE != _PAIR and residual_scale is None:
                tl.store(residual + residual_at + start, rounded, mask=mask)
            if SOURCE == _GATED:
                added = new
                if ROUNDS_ONCE:
                    added = product(ys[chunk], factor)
                x_out = round_to(xs[chunk].to(tl.float32) + added, dtype)
                given = x_out
                if INDEXED:
                    given = tl.where(exists, x_out.to(tl.float32), float("nan")).to(dtype)
                tl.store(out + out_at + start, given, mask=written & inside)
                streams = streams + (x_out.to(tl.float32),)
            elif out is not None and not LATE:
                tl.store(out + out_at + start, ys[chunk], mask=mask)
            residuals = residuals + (rounded,)

            measured = measure(new, kept(stored[chunk], old_scale), SQUARES, VECTOR)
            for index in tl.static_range(len(STRIDES)):
                paired = frame >= STRIDES[index]
                if STRIDES[index] == 1:
                    earlier = before[chunk]
                else:
                    # Recompute from y (mostly in L2): residual stores of other threads may not be visible
                    # yet, and float8 is not exact.
                    earlier_y = tl.load(
                        y + y_at + start - STRIDES[index] * y_frame, mask=mask & paired, other=0.0
                    )
                    if SOURCE == _STACK:
                        earlier_x = tl.load(
                            x + x_at + start - STRIDES[index] * x_frame, mask=mask & paired, other=0.0
                        )
                        earlier = round_to(earlier_y.to(tl.float32) - earlier_x.to(tl.float32), dtype)
                    else:
                        earlier_factor = factor
                        if gate is not None and GATE != _SHARED:
                            earlier_factor = load_modulator(
                                gate,
                                gate_table,
                                gate_step,
                                frame - STRIDES[index],
                                token - STRIDES[index] * tl.full([], places, tl.int64),
                                here,
                                mask & paired,
                                GATE,
                            )
                        earlier = gated(earlier_y, earlier_factor, dtype)
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
        if norm_out is not None:
            store_norm(
                norm_out,
                norm_at,
                None,
                None,
                streams,
                weight,
                bias,
                shift,
                scale,
                shift_table,
                scale_table,
                eps,
                shift_step,
                scale_step,
                frame,
                token,
                channel,
                channels,
                written,
                exists if INDEXED else None,
                SHIFT,
                SCALE,
                RMS,
                BLOCK_CHANNELS,
            )
            norm_out += norm_frame
        y += y_frame
        residual += residual_frame
        if x is not None:
            x += x_frame
        if out is not None and not LATE:
            out += out_frame
    if LATE:
        if BARRIER:
            tl.debug_barrier()
        for frame in range(frames):
            for chunk in tl.static_range(CHUNKS):
                start = chunk * BLOCK_CHANNELS
                mask = present & (channel + start < channels)
                tl.store(
                    out + out_at + start, tl.load(first_y + y_at + start, mask=mask, other=0.0), mask=mask
                )
            first_y += y_frame
            out += out_frame
    store_sums(partial, sums, exists, row, tl.num_programs(0) // blocks, block, blocks, SQUARES)


def meter(
    source: int,
    x: torch.Tensor | None,
    y: torch.Tensor,
    residual: torch.Tensor,
    video_of_row: torch.Tensor | None,
    num_videos: int,
    frames: int,
    strides: Sequence[int],
    metric: int,
    *,
    gate: torch.Tensor | None = None,
    gate_table: torch.Tensor | None = None,
    rounding: int = ROUNDINGS["eager"],
    residual_scale: torch.Tensor | None = None,
    x_rows: torch.Tensor | None = None,
    residual_rows: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    norm: Norm = Norm(),  # noqa: B008
) -> torch.Tensor:
    """Launch; returns the sums."""
    rows, tokens, channels = y.shape
    places = tokens // frames
    squares = metric != METRICS["l1"]
    gates, shifts, scales = (modulator(tensor, frames, tokens) for tensor in (gate, norm.shift, norm.scale))
    fit = aligned(x, y, gate, residual, out, norm.out)
    whole = residual_scale is not None or norm.out is not None
    tile = (whole_token_tiling if whole else tiling)(places, channels, y.element_size(), aligned=fit)
    warps = warps_of(tile) if whole else tile.warps
    blocks = tile.blocks if y.numel() else 0
    in_place = source == STACK and out is not None and x is not None and out.data_ptr() == x.data_ptr()
    partial = torch.empty((7 + 2 * len(strides), rows, blocks), dtype=torch.float64, device=y.device)
    with on_device(y):
        if blocks:
            meter_kernel[(rows * blocks,)](
                x,
                y,
                gate,
                residual if residual_scale is None else residual.view(torch.uint8),
                residual_scale,
                x_rows,
                residual_rows,
                norm.shift,
                norm.scale,
                gate_table,
                norm.shift_table,
                norm.scale_table,
                norm.weight,
                norm.bias,
                out,
                norm.out,
                partial,
                blocks,
                frames,
                places,
                channels,
                0 if x is None else x.shape[0],
                residual.shape[0],
                norm.eps,
                *row_and_token(x),
                *row_and_token(y),
                gates.row,
                gates.step,
                *row_and_token(residual),
                *row_and_token(residual_scale),
                shifts.row,
                shifts.step,
                scales.row,
                scales.step,
                *row_and_token(out),
                *row_and_token(norm.out),
                SOURCE=source,
                STRIDES=tuple(strides),
                SQUARES=squares,
                GATE=gates.per,
                SHIFT=shifts.per,
                SCALE=scales.per,
                ROUNDS_ONCE=rounds_once(rounding, y),
                RMS=norm.kind == NORMS["rms"],
                LATE=in_place and any(stride != 1 for stride in strides),
                BARRIER=not fit and source != PAIR,
                BLOCK_PLACES=tile.places,
                BLOCK_CHANNELS=tile.channels,
                CHUNKS=tile.chunks,
                VECTOR=tile.vector,
                num_warps=warps,
                enable_fp_fusion=False,  # eager PyTorch rounds gate*y before the addition
            )
        return combine_sums(partial, video_of_row, num_videos, squares=squares)


def warps_of(tile: Tiling) -> int:
    """Warps of programs with whole tokens. Single-element accesses need more registers for addresses."""
    return min(tile.warps * 2, 16) if tile.vector == 1 else tile.warps


def row_and_token(tensor: torch.Tensor | None) -> tuple[int, int]:
    """Row and token strides."""
    return (0, 0) if tensor is None else (tensor.stride(0), tensor.stride(1))

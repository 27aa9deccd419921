"""x + gate*y, gate*y over the old residual, and the sums of both residuals, in one pass; and, for
`gated_residual_norm_meter`, the layer norm of the result in the same pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..columns import METRICS
from .launch import SHARED, aligned, modulator, on_device, tiling, whole_token_tiling
from .norm import store_norm
from .numeric import round_to
from .sums import add_sums, combine_sums, measure, measure_motion, no_sums, store_sums
from .tokens import gated, kept, load_modulator, row_of, store_float8

_SHARED = tl.constexpr(SHARED)


@triton.jit
def gated_residual_meter_kernel(
    x,
    y,
    gate,
    residual,
    residual_scale,
    x_rows,
    residual_rows,
    shift,
    scale,
    weight,
    bias,
    out,
    norm_out,  # None: no norm
    partial,  # [columns, rows, blocks] float64
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
    STRIDES: tl.constexpr,
    SQUARES: tl.constexpr,
    GATE: tl.constexpr,
    SHIFT: tl.constexpr,
    SCALE: tl.constexpr,
    BARRIER: tl.constexpr,
    BLOCK_PLACES: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    CHUNKS: tl.constexpr,  # a norm and float8 need all channels of a token
    VECTOR: tl.constexpr,
):
    # A program stays on its places and walks over the frames, so that the frames of a motion pair meet in its
    # registers.
    dtype: tl.constexpr = out.dtype.element_ty
    INDEXED: tl.constexpr = x_rows is not None or residual_rows is not None
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    channel_blocks = tl.cdiv(channels, BLOCK_CHANNELS * CHUNKS)
    place = (block // channel_blocks * BLOCK_PLACES + tl.arange(0, BLOCK_PLACES)).to(tl.int64)[:, None]
    channel = (block % channel_blocks * (BLOCK_CHANNELS * CHUNKS) + tl.arange(0, BLOCK_CHANNELS))[None, :]
    row_of_x = row_of(x_rows, row, x_total)
    row_of_residual = row_of(residual_rows, row, residual_total)
    exists = (row_of_x >= 0) & (row_of_residual >= 0)
    written = place < places
    present = written
    if INDEXED:
        # A limit: the interpreter cannot broadcast a scalar mask.
        present = place < tl.where(exists, places, 0)

    x_frame = tl.full([], places, tl.int64) * x_token
    y_frame = tl.full([], places, tl.int64) * y_token
    residual_frame = tl.full([], places, tl.int64) * residual_token
    residual_scale_frame = tl.full([], places, tl.int64) * residual_scale_token
    out_frame = tl.full([], places, tl.int64) * out_token
    norm_frame = tl.full([], places, tl.int64) * norm_token
    x_at = place * x_token + channel
    y_at = place * y_token + channel
    residual_at = place * residual_token + channel
    residual_scale_at = place * residual_scale_token
    out_at = place * out_token + channel
    norm_at = place * norm_token + channel
    x += row_of_x * x_row
    y += row * y_row
    residual += row_of_residual * residual_row
    out += row * out_row
    if residual_scale is not None:
        residual_scale += row_of_residual * residual_scale_row
    if gate is not None:
        gate += row * gate_row
    if shift is not None:
        shift += row * shift_row
    if scale is not None:
        scale += row * scale_row
    if norm_out is not None:
        norm_out += row * norm_row

    # One gate for all frames stays in registers if it is one tile.
    ONE_FACTOR: tl.constexpr = gate is not None and GATE == _SHARED and CHUNKS == 1
    one_factor = None
    if ONE_FACTOR:
        one_factor = load_modulator(gate, gate_step, 0, place, channel, present & (channel < channels), GATE)
    before = ()
    for chunk in tl.static_range(CHUNKS):
        before = before + (tl.zeros([BLOCK_PLACES, BLOCK_CHANNELS], dtype=dtype),)
    sums = no_sums(BLOCK_PLACES, BLOCK_CHANNELS, STRIDES, SQUARES, VECTOR)

    for frame in range(frames):
        token = place + frame * tl.full([], places, tl.int64)
        old_scale = None
        if residual_scale is not None:
            old_scale = tl.load(residual_scale + residual_scale_at, mask=present, other=1.0)
        # All that is read of a frame is on its way before the first of it is used or written.
        stored = ()
        ys = ()
        xs = ()
        for chunk in tl.static_range(CHUNKS):
            start = chunk * BLOCK_CHANNELS
            mask = present & (channel + start < channels)
            stored = stored + (tl.load(residual + residual_at + start, mask=mask, other=0),)
            ys = ys + (tl.load(y + y_at + start, mask=mask, other=0.0),)
            xs = xs + (tl.load(x + x_at + start, mask=mask, other=0.0),)
        if BARRIER:
            # Loads and stores of different widths give an element to different threads: none may write what
            # another has still to read.
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
                factor = load_modulator(gate, gate_step, frame, token, here, mask, GATE)
            rounded = gated(ys[chunk], factor, dtype)
            new = rounded.to(tl.float32)
            x_out = round_to(xs[chunk].to(tl.float32) + new, dtype)
            if residual_scale is None:
                tl.store(residual + residual_at + start, rounded, mask=mask)
            given = x_out
            if INDEXED:
                given = tl.where(exists, x_out.to(tl.float32), float("nan")).to(dtype)
            tl.store(out + out_at + start, given, mask=written & inside)
            residuals = residuals + (rounded,)
            streams = streams + (x_out.to(tl.float32),)

            measured = measure(new, kept(stored[chunk], old_scale), SQUARES, VECTOR)
            for index in tl.static_range(len(STRIDES)):
                paired = frame >= STRIDES[index]
                if STRIDES[index] == 1:
                    earlier = before[chunk]
                else:
                    # y again (mostly from L2) and not the residual: what other threads of this program have
                    # stored is not sure to be seen, and float8 has lost some of it.
                    earlier_factor = factor
                    if gate is not None and GATE != _SHARED:
                        earlier_factor = load_modulator(
                            gate,
                            gate_step,
                            frame - STRIDES[index],
                            token - STRIDES[index] * tl.full([], places, tl.int64),
                            here,
                            mask & paired,
                            GATE,
                        )
                    earlier_y = tl.load(
                        y + y_at + start - STRIDES[index] * y_frame, mask=mask & paired, other=0.0
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
        if norm_out is not None:
            store_norm(
                norm_out,
                norm_at,
                streams,
                weight,
                bias,
                shift,
                scale,
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
                BLOCK_CHANNELS,
            )
            norm_out += norm_frame
        x += x_frame
        y += y_frame
        residual += residual_frame
        if residual_scale is not None:
            residual_scale += residual_scale_frame
        out += out_frame
    store_sums(partial, sums, exists, row, tl.num_programs(1), block, tl.num_programs(0), SQUARES)


def gated_residual_meter(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    residual: torch.Tensor,
    residual_scale: torch.Tensor | None,
    x_rows: torch.Tensor | None,
    residual_rows: torch.Tensor | None,
    video_of_row: torch.Tensor | None,
    num_videos: int,
    frames: int,
    strides: Sequence[int],
    metric: int,
    out: torch.Tensor,
) -> torch.Tensor:
    """Launch; returns the sums."""
    return launch(
        x,
        y,
        gate,
        residual,
        residual_scale,
        (None, None, None, None, 0.0),
        x_rows,
        residual_rows,
        video_of_row,
        num_videos,
        frames,
        strides,
        metric,
        out,
        None,
    )


def launch(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    residual: torch.Tensor,
    residual_scale: torch.Tensor | None,
    norm: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, float],
    x_rows: torch.Tensor | None,
    residual_rows: torch.Tensor | None,
    video_of_row: torch.Tensor | None,
    num_videos: int,
    frames: int,
    strides: Sequence[int],
    metric: int,
    out: torch.Tensor,
    norm_out: torch.Tensor | None,
) -> torch.Tensor:
    rows, tokens, channels = y.shape
    places = tokens // frames
    squares = metric != METRICS["l1"]
    shift, scale, weight, bias, eps = norm
    gates, shifts, scales = (modulator(tensor, frames, tokens) for tensor in (gate, shift, scale))
    fit = aligned(x, y, gate, residual, out, norm_out)
    whole = residual_scale is not None or norm_out is not None
    tile = (whole_token_tiling if whole else tiling)(places, channels, x.element_size(), aligned=fit)
    blocks = tile.blocks if y.numel() else 0
    partial = torch.empty((7 + 2 * len(strides), rows, blocks), dtype=torch.float64, device=x.device)
    with on_device(x):
        if blocks:
            gated_residual_meter_kernel[(blocks, rows)](
                x,
                y,
                gate,
                residual if residual_scale is None else residual.view(torch.uint8),
                residual_scale,
                x_rows,
                residual_rows,
                shift,
                scale,
                weight,
                bias,
                out,
                norm_out,
                partial,
                frames,
                places,
                channels,
                x.shape[0],
                residual.shape[0],
                eps,
                x.stride(0),
                x.stride(1),
                y.stride(0),
                y.stride(1),
                gates.row,
                gates.step,
                residual.stride(0),
                residual.stride(1),
                *(residual_scale.stride() if residual_scale is not None else (0, 0)),
                shifts.row,
                shifts.step,
                scales.row,
                scales.step,
                out.stride(0),
                out.stride(1),
                *(norm_out.stride()[:2] if norm_out is not None else (0, 0)),
                STRIDES=tuple(strides),
                SQUARES=squares,
                GATE=gates.per,
                SHIFT=shifts.per,
                SCALE=scales.per,
                BARRIER=not fit,
                BLOCK_PLACES=tile.places,
                BLOCK_CHANNELS=tile.channels,
                CHUNKS=tile.chunks,
                VECTOR=tile.vector,
                num_warps=tile.warps,
                enable_fp_fusion=False,  # eager PyTorch rounds gate*y before it adds
            )
        return combine_sums(partial, video_of_row, num_videos, squares=squares)

# SPDX-License-Identifier: Apache-2.0
"""x + gate*y in one pass. For `gated_residual_norm` and the norms also the norm of the result (or of x)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._choices import NORMS
from .launch import (
    Norm,
    aligned,
    frames_of,
    modulator,
    on_device,
    rounds_once,
    tiling,
    whole_token_tiling,
)
from .norm import store_norm
from .numeric import round_to
from .tokens import gated, load_modulator, product, row_of


@triton.jit(do_not_specialize=["blocks"])
def gated_residual_kernel(
    x,
    y,  # None: only the norm of x
    gate,
    x_rows,
    shift,
    scale,
    gate_table,
    shift_table,
    scale_table,
    weight,
    bias,
    out,
    norm_out,  # None: no norm
    norm_scale,  # None: the norm is not in float8
    blocks,
    tokens,
    places,
    channels,
    x_total,
    eps,
    x_row,
    x_token,
    y_row,
    y_token,
    gate_row,
    gate_step,
    shift_row,
    shift_step,
    scale_row,
    scale_step,
    out_row,
    out_token,
    norm_row,
    norm_token,
    norm_scale_row,
    norm_scale_token,
    GATE: tl.constexpr,
    SHIFT: tl.constexpr,
    SCALE: tl.constexpr,
    ROUNDS_ONCE: tl.constexpr,
    RMS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    CHUNKS: tl.constexpr,  # > 1: a norm needs all channels of a token
):
    dtype: tl.constexpr = x.dtype.element_ty
    block = tl.program_id(0) % blocks
    row = (tl.program_id(0) // blocks).to(tl.int64)
    channel_blocks = tl.cdiv(channels, BLOCK_CHANNELS * CHUNKS)
    token = (block // channel_blocks * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS))[:, None]
    channel = (block % channel_blocks * (BLOCK_CHANNELS * CHUNKS) + tl.arange(0, BLOCK_CHANNELS))[None, :]
    frame = (token // places).to(tl.int64)
    token = token.to(tl.int64)
    row_of_x = row_of(x_rows, row, x_total)
    exists = row_of_x >= 0
    written = token < tokens
    present = written
    if x_rows is not None:
        # Not a scalar mask: the interpreter cannot broadcast it.
        present = token < tl.where(exists, tokens, 0)
    x_at = row_of_x * x_row + token * x_token + channel
    y_at = row * y_row + token * y_token + channel
    if gate is not None:
        gate += row * gate_row
    if shift is not None:
        shift += row * shift_row
    if scale is not None:
        scale += row * scale_row

    # All loads are issued before the first use or store.
    xs = ()
    ys = ()
    for chunk in tl.static_range(CHUNKS):
        start = chunk * BLOCK_CHANNELS
        mask = present & (channel + start < channels)
        xs = xs + (tl.load(x + x_at + start, mask=mask, other=0.0),)
        if y is not None:
            ys = ys + (tl.load(y + y_at + start, mask=mask, other=0.0),)
    streams = ()
    for chunk in tl.static_range(CHUNKS):
        start = chunk * BLOCK_CHANNELS
        here = channel + start
        mask = present & (here < channels)
        stream = xs[chunk].to(tl.float32)
        if y is not None:
            factor = None
            if gate is not None:
                factor = load_modulator(gate, gate_table, gate_step, frame, token, here, mask, GATE)
            if ROUNDS_ONCE:
                total = stream + product(ys[chunk], factor)
            else:
                total = stream + gated(ys[chunk], factor, dtype).to(tl.float32)
            given = total
            if x_rows is not None:
                given = tl.where(exists, total, float("nan"))
            tl.store(
                out + row * out_row + token * out_token + here,
                round_to(given, dtype),
                mask=written & (here < channels),
            )
            stream = round_to(total, dtype).to(tl.float32)
        streams = streams + (stream,)
    if norm_out is not None:
        store_norm(
            norm_out,
            row * norm_row + token * norm_token + channel,
            norm_scale,
            row * norm_scale_row + token * norm_scale_token,
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
            exists if x_rows is not None else None,
            SHIFT,
            SCALE,
            RMS,
            BLOCK_CHANNELS,
        )


def gated_residual(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    gate_table: torch.Tensor | None,
    x_rows: torch.Tensor | None,
    rounding: int,
    out: torch.Tensor,
) -> None:
    """Launch."""
    launch(x, y, gate, gate_table, x_rows, out, rounding, Norm())


def launch(
    x: torch.Tensor,
    y: torch.Tensor | None,
    gate: torch.Tensor | None,
    gate_table: torch.Tensor | None,
    x_rows: torch.Tensor | None,
    out: torch.Tensor | None,
    rounding: int,
    norm: Norm,
) -> None:
    rows = x.shape[0] if x_rows is None else x_rows.shape[0]
    tokens, channels = x.shape[1:]
    if rows * tokens * channels == 0:
        return
    frames = frames_of(gate, norm.shift, norm.scale, tokens=tokens)
    gates, shifts, scales = (modulator(tensor, frames, tokens) for tensor in (gate, norm.shift, norm.scale))
    fit = aligned(x, y, out, norm.out)
    tile = (tiling if norm.out is None else whole_token_tiling)(
        tokens, channels, x.element_size(), aligned=fit
    )
    with on_device(x):
        gated_residual_kernel[(rows * tile.blocks,)](
            x,
            y,
            gate,
            x_rows,
            norm.shift,
            norm.scale,
            gate_table,
            norm.shift_table,
            norm.scale_table,
            norm.weight,
            norm.bias,
            out,
            norm.out,
            norm.out_scale,
            tile.blocks,
            tokens,
            tokens // frames,
            channels,
            x.shape[0],
            norm.eps,
            x.stride(0),
            x.stride(1),
            *(y.stride()[:2] if y is not None else (0, 0)),
            gates.row,
            gates.step,
            shifts.row,
            shifts.step,
            scales.row,
            scales.step,
            *(out.stride()[:2] if out is not None else (0, 0)),
            *(norm.out.stride()[:2] if norm.out is not None else (0, 0)),
            *(norm.out_scale.stride()[:2] if norm.out_scale is not None else (0, 0)),
            GATE=gates.per,
            SHIFT=shifts.per,
            SCALE=scales.per,
            ROUNDS_ONCE=rounds_once(rounding, x),
            RMS=norm.kind == NORMS["rms"],
            BLOCK_TOKENS=tile.places,
            BLOCK_CHANNELS=tile.channels,
            CHUNKS=tile.chunks,
            num_warps=tile.warps,
            enable_fp_fusion=False,  # eager PyTorch rounds gate*y before the addition
        )

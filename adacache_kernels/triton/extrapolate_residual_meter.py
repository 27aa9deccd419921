# SPDX-License-Identifier: Apache-2.0
"""x + (c0*F0 + c1*F1 + ...), and sums of this forecast and a second one, or a computed residual. One pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..columns import METRICS
from .launch import aligned, on_device, tiling
from .numeric import round_to
from .sums import add_sums, combine_sums, measure, measure_motion, no_sums, store_sums
from .tokens import row_of


@triton.jit
def forecast_of(tiles, coefficients, video, known):
    """The sum of coefficient * tile from left to right, in float32."""
    forecast = tiles[0].to(tl.float32)
    for order in tl.static_range(len(tiles)):
        coefficient = tl.load(coefficients + video * len(tiles) + order, mask=known, other=0.0)
        term = coefficient * tiles[order].to(tl.float32)
        forecast = term if order == 0 else forecast + term
    return forecast


@triton.jit
def load_factors(factors, factor_rows, factor_tokens, row, token, channel, mask):
    tiles = ()
    for order in tl.static_range(len(factors)):
        at = row * factor_rows[order] + token * factor_tokens[order] + channel
        tiles = tiles + (tl.load(factors[order] + at, mask=mask, other=0.0),)
    return tiles


@triton.jit(do_not_specialize=["blocks"])
def extrapolate_residual_meter_kernel(
    x,
    factors,  # a tuple of tensors
    coefficients,  # [num_videos, factors] float32
    other_coefficients,  # None: `computed` is measured against
    computed,
    x_rows,
    residual_rows,
    video_of_row,
    out,
    partial,  # [columns, rows, blocks] float64
    blocks,
    frames,
    places,
    channels,
    x_total,
    residual_total,
    num_videos,
    x_row,
    x_token,
    factor_rows,  # tuples of strides
    factor_tokens,
    computed_row,
    computed_token,
    out_row,
    out_token,
    STRIDES: tl.constexpr,
    SQUARES: tl.constexpr,
    BLOCK_PLACES: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    # A program loops over the frames of its places.
    block = tl.program_id(0) % blocks
    row = (tl.program_id(0) // blocks).to(tl.int64)
    channel_blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    place = (block // channel_blocks * BLOCK_PLACES + tl.arange(0, BLOCK_PLACES)).to(tl.int64)[:, None]
    channel = (block % channel_blocks * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS))[None, :]
    row_of_x = row_of(x_rows, row, x_total)
    row_of_residual = row_of(residual_rows, row, residual_total)
    video = row * 0
    if video_of_row is not None:
        video = tl.load(video_of_row + row).to(tl.int64)
    known = (video >= 0) & (video < num_videos)
    exists = known & (row_of_x >= 0) & (row_of_residual >= 0)
    written = (place < places) & (channel < channels)
    # Not a scalar mask: the interpreter cannot broadcast it.
    mask = (place < tl.where(exists, places, 0)) & (channel < channels)

    before = tl.zeros([BLOCK_PLACES, BLOCK_CHANNELS], dtype=tl.float32)
    sums = no_sums(BLOCK_PLACES, BLOCK_CHANNELS, STRIDES, SQUARES, VECTOR)
    for frame in range(frames):
        token = place + frame * tl.full([], places, tl.int64)
        tiles = load_factors(factors, factor_rows, factor_tokens, row_of_residual, token, channel, mask)
        stream = tl.load(x + row_of_x * x_row + token * x_token + channel, mask=mask, other=0.0)
        new = forecast_of(tiles, coefficients, video, known)
        if computed is not None:
            at = row * computed_row + token * computed_token + channel
            old = tl.load(computed + at, mask=mask, other=0.0).to(tl.float32)
        else:
            old = forecast_of(tiles, other_coefficients, video, known)
        total = tl.where(exists, stream.to(tl.float32) + new, float("nan"))
        at = row * out_row + token * out_token + channel
        tl.store(out + at, round_to(total, out.dtype.element_ty), mask=written)
        # A coefficient that is not finite gives NaN outside the tensor.
        new = tl.where(mask, new, 0.0)
        old = tl.where(mask, old, 0.0)
        measured = measure(new, old, SQUARES, VECTOR)
        for index in tl.static_range(len(STRIDES)):
            paired = frame >= STRIDES[index]
            if STRIDES[index] == 1:
                earlier = before
            else:
                earlier_token = token - STRIDES[index] * tl.full([], places, tl.int64)
                earlier_tiles = load_factors(
                    factors,
                    factor_rows,
                    factor_tokens,
                    row_of_residual,
                    earlier_token,
                    channel,
                    mask & paired,
                )
                earlier = forecast_of(earlier_tiles, coefficients, video, known)
                earlier = tl.where(mask, earlier, 0.0)
            measured = measured + measure_motion(new, earlier, paired, VECTOR)
        sums = add_sums(sums, measured)
        before = new
    store_sums(partial, sums, exists, row, tl.num_programs(0) // blocks, block, blocks, SQUARES)


def extrapolate_residual_meter(
    x: torch.Tensor,
    factors: Sequence[torch.Tensor],
    coefficients: torch.Tensor,
    other_coefficients: torch.Tensor | None,
    computed: torch.Tensor | None,
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
    rows, tokens, channels = out.shape
    places = tokens // frames
    squares = metric != METRICS["l1"]
    fit = aligned(x, out, computed, *factors)
    tile = tiling(places, channels, x.element_size(), aligned=fit)
    blocks = tile.blocks if out.numel() else 0
    partial = torch.empty((7 + 2 * len(strides), rows, blocks), dtype=torch.float64, device=x.device)
    with on_device(x):
        if blocks:
            extrapolate_residual_meter_kernel[(rows * blocks,)](
                x,
                tuple(factors),
                coefficients,
                other_coefficients,
                computed,
                x_rows,
                residual_rows,
                video_of_row,
                out,
                partial,
                blocks,
                frames,
                places,
                channels,
                x.shape[0],
                factors[0].shape[0],
                num_videos,
                x.stride(0),
                x.stride(1),
                tuple(factor.stride(0) for factor in factors),
                tuple(factor.stride(1) for factor in factors),
                0 if computed is None else computed.stride(0),
                0 if computed is None else computed.stride(1),
                out.stride(0),
                out.stride(1),
                STRIDES=tuple(strides),
                SQUARES=squares,
                BLOCK_PLACES=tile.places,
                BLOCK_CHANNELS=tile.channels,
                VECTOR=tile.vector,
                num_warps=tile.warps,
                enable_fp_fusion=False,
            )
        return combine_sums(partial, video_of_row, num_videos, squares=squares)

# SPDX-License-Identifier: Apache-2.0
"""x + (c0*F0 + c1*F1 + ...), a residual forecast from kept factors, in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .launch import aligned, on_device, tiling
from .numeric import round_to
from .tokens import row_of


@triton.jit(do_not_specialize=["blocks"])
def extrapolate_residual_kernel(
    x,
    factors,  # a tuple of tensors
    coefficients,  # [num_videos, factors] float32
    x_rows,
    residual_rows,
    video_of_row,
    out,
    blocks,
    tokens,
    channels,
    x_total,
    residual_total,
    num_videos,
    x_row,
    x_token,
    factor_rows,  # tuples of strides
    factor_tokens,
    out_row,
    out_token,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    block = tl.program_id(0) % blocks
    row = (tl.program_id(0) // blocks).to(tl.int64)
    channel_blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    token = (block // channel_blocks * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)[:, None]
    channel = (block % channel_blocks * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS))[None, :]
    row_of_x = row_of(x_rows, row, x_total)
    row_of_residual = row_of(residual_rows, row, residual_total)
    video = row
    if video_of_row is not None:
        video = tl.load(video_of_row + row).to(tl.int64)
    elif num_videos == 1:
        video = row * 0
    known = (video >= 0) & (video < num_videos)
    exists = known & (row_of_x >= 0) & (row_of_residual >= 0)
    # Not a scalar mask: the interpreter cannot broadcast it.
    mask = (token < tl.where(exists, tokens, 0)) & (channel < channels)

    forecast = tl.zeros([BLOCK_TOKENS, BLOCK_CHANNELS], dtype=tl.float32)
    for order in tl.static_range(len(factors)):
        coefficient = tl.load(coefficients + video * len(factors) + order, mask=known, other=0.0)
        at = row_of_residual * factor_rows[order] + token * factor_tokens[order] + channel
        term = coefficient * tl.load(factors[order] + at, mask=mask, other=0.0).to(tl.float32)
        forecast = term if order == 0 else forecast + term
    stream = tl.load(x + row_of_x * x_row + token * x_token + channel, mask=mask, other=0.0).to(tl.float32)
    total = tl.where(exists, stream + forecast, float("nan"))
    tl.store(
        out + row * out_row + token * out_token + channel,
        round_to(total, out.dtype.element_ty),
        mask=(token < tokens) & (channel < channels),
    )


def extrapolate_residual(
    x: torch.Tensor,
    factors: Sequence[torch.Tensor],
    coefficients: torch.Tensor,
    x_rows: torch.Tensor | None,
    residual_rows: torch.Tensor | None,
    video_of_row: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Launch."""
    rows, tokens, channels = out.shape
    if out.numel() == 0:
        return
    tile = tiling(tokens, channels, x.element_size(), aligned=aligned(x, out, *factors))
    with on_device(x):
        extrapolate_residual_kernel[(rows * tile.blocks,)](
            x,
            tuple(factors),
            coefficients,
            x_rows,
            residual_rows,
            video_of_row,
            out,
            tile.blocks,
            tokens,
            channels,
            x.shape[0],
            factors[0].shape[0],
            coefficients.shape[0],
            x.stride(0),
            x.stride(1),
            tuple(factor.stride(0) for factor in factors),
            tuple(factor.stride(1) for factor in factors),
            out.stride(0),
            out.stride(1),
            BLOCK_TOKENS=tile.places,
            BLOCK_CHANNELS=tile.channels,
            num_warps=tile.warps,
            enable_fp_fusion=False,
        )

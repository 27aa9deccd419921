# SPDX-License-Identifier: Apache-2.0
"""x + residual for the rows of videos that reuse, x for the others, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import aligned, on_device, tiling
from .numeric import round_to
from .tokens import kept, row_of


@triton.jit(do_not_specialize=["blocks"])
def reuse_residual_kernel(
    x,
    residual,
    residual_scale,
    x_rows,
    residual_rows,
    video_of_row,
    reuse,  # None: all reuse
    out,
    blocks,
    tokens,
    channels,
    x_total,
    residual_total,
    num_videos,
    x_row,
    x_token,
    residual_row,
    residual_token,
    residual_scale_row,
    residual_scale_token,
    out_row,
    out_token,
    IN_PLACE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    SOME: tl.constexpr = reuse is not None
    CHECKED: tl.constexpr = SOME or x_rows is not None or residual_rows is not None
    block = tl.program_id(0) % blocks
    row = (tl.program_id(0) // blocks).to(tl.int64)
    channel_blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    token = (block // channel_blocks * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)[:, None]
    channel = (block % channel_blocks * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS))[None, :]

    row_of_x = row_of(x_rows, row, x_total)
    row_of_residual = row_of(residual_rows, row, residual_total)
    exists = row_of_x >= 0
    reuses = exists
    if SOME:
        video = row
        if video_of_row is not None:
            video = tl.load(video_of_row + row).to(tl.int64)
        elif num_videos == 1:
            video = row * 0
        known = (video >= 0) & (video < num_videos)
        exists = exists & known
        reuses = tl.load(reuse + video, mask=known, other=1) != 0
    exists = exists & ((row_of_residual >= 0) | (reuses == 0))
    # Not scalar masks: the interpreter cannot broadcast them.
    present = token < tokens
    reused = present
    if CHECKED:
        present = token < tl.where(exists, tokens, 0)
        reused = token < tl.where(exists & reuses, tokens, 0)
    written = (token < tokens) & (channel < channels)
    if SOME and IN_PLACE:
        written = (token < tl.where(reuses, tokens, 0)) & (channel < channels)
        present = reused
    stream = tl.load(
        x + row_of_x * x_row + token * x_token + channel, mask=present & (channel < channels), other=0.0
    )
    scale = None
    if residual_scale is not None:
        scale = tl.load(
            residual_scale + row_of_residual * residual_scale_row + token * residual_scale_token,
            mask=reused,
            other=1.0,
        )
    stored = tl.load(
        residual + row_of_residual * residual_row + token * residual_token + channel,
        mask=reused & (channel < channels),
        other=0,
    )
    total = stream.to(tl.float32) + kept(stored, scale)
    if CHECKED:
        total = tl.where(exists, total, float("nan"))
    total = round_to(total, out.dtype.element_ty)
    if SOME:
        # A row that does not reuse is copied: x + 0 would change -0 to 0.
        total = tl.where(reuses | (exists == 0), total, stream)
    tl.store(out + row * out_row + token * out_token + channel, total, mask=written)


def reuse_residual(
    x: torch.Tensor,
    residual: torch.Tensor,
    residual_scale: torch.Tensor | None,
    x_rows: torch.Tensor | None,
    residual_rows: torch.Tensor | None,
    video_of_row: torch.Tensor | None,
    reuse: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Launch."""
    rows, tokens, channels = out.shape
    if out.numel() == 0:
        return
    tile = tiling(tokens, channels, x.element_size(), aligned=aligned(x, residual, out))
    with on_device(x):
        reuse_residual_kernel[(rows * tile.blocks,)](
            x,
            residual if residual_scale is None else residual.view(torch.uint8),
            residual_scale,
            x_rows,
            residual_rows,
            video_of_row,
            None if reuse is None else reuse.view(torch.uint8),
            out,
            tile.blocks,
            tokens,
            channels,
            x.shape[0],
            residual.shape[0],
            1 if reuse is None else reuse.shape[0],
            x.stride(0),
            x.stride(1),
            residual.stride(0),
            residual.stride(1),
            *(residual_scale.stride() if residual_scale is not None else (0, 0)),
            out.stride(0),
            out.stride(1),
            IN_PLACE=out.data_ptr() == x.data_ptr(),
            BLOCK_TOKENS=tile.places,
            BLOCK_CHANNELS=tile.channels,
            num_warps=tile.warps,
            enable_fp_fusion=False,
        )

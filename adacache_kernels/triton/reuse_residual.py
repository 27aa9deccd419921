"""x + residual for the rows whose video reuses, x for the others, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import NUM_WARPS, on_device, tiling
from .numeric import round_to


@triton.jit
def reuse_residual_kernel(
    x,
    residual,
    video_of_row,
    reuse,
    out,
    tokens,
    channels,
    num_videos,
    x_row,
    x_token,
    residual_row,
    residual_token,
    out_row,
    out_token,
    SOME: tl.constexpr,  # `reuse` says which videos reuse
    BY_VIDEO: tl.constexpr,  # ... of the videos that `video_of_row` names
    IN_PLACE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    channel_blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    token = (block // channel_blocks * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)[:, None]
    channel = (block % channel_blocks * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS))[None, :]
    mask = (token < tokens) & (channel < channels)

    exists = True
    reuses = True
    # Tokens of this row that take the residual. A limit: the interpreter cannot broadcast a scalar mask.
    reused = tokens
    if SOME:
        video = row
        if BY_VIDEO:
            video = tl.load(video_of_row + row).to(tl.int64)
        elif num_videos == 1:
            video = row * 0
        exists = (video >= 0) & (video < num_videos)
        reuses = tl.load(reuse + video, mask=exists, other=1) != 0
        reused = tl.where(reuses, tokens, 0)
    cached_mask = (token < reused) & (channel < channels)
    if IN_PLACE:
        mask = cached_mask
    stream = tl.load(x + row * x_row + token * x_token + channel, mask=mask, other=0.0)
    cached = tl.load(
        residual + row * residual_row + token * residual_token + channel, mask=cached_mask, other=0.0
    ).to(tl.float32)
    total = stream.to(tl.float32) + cached
    if SOME:
        total = tl.where(exists, total, float("nan"))
    total = round_to(total, out.dtype.element_ty)
    if SOME:
        # A row that does not reuse keeps its bits: x + 0 would turn -0 into 0.
        total = tl.where(reuses, total, stream)
    tl.store(out + row * out_row + token * out_token + channel, total, mask=mask)


def reuse_residual(
    x: torch.Tensor,
    residual: torch.Tensor,
    video_of_row: torch.Tensor | None,
    reuse: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Launch."""
    rows, tokens, channels = x.shape
    if x.numel() == 0:
        return
    tile = tiling(tokens, channels, 8)
    with on_device(x):
        reuse_residual_kernel[(tile.blocks, rows)](
            x,
            residual,
            video_of_row,
            None if reuse is None else reuse.view(torch.uint8),
            out,
            tokens,
            channels,
            1 if reuse is None else reuse.shape[0],
            x.stride(0),
            x.stride(1),
            residual.stride(0),
            residual.stride(1),
            out.stride(0),
            out.stride(1),
            SOME=reuse is not None,
            BY_VIDEO=video_of_row is not None,
            IN_PLACE=out.data_ptr() == x.data_ptr(),
            BLOCK_TOKENS=tile.places,
            BLOCK_CHANNELS=tile.channels,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )

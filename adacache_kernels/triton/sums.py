"""The second half of both meters: partial sums of the programs, combined per video in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

#: Frames that are summed in float32 before float64 takes over.
FRAMES_PER_RUN = tl.constexpr(16)


@triton.jit
def combine_sums_kernel(
    partial,  # [columns, rows, blocks] float64
    video_of_row,
    sums,  # [num_videos, columns] float64
    rows,
    blocks,
    num_videos,
    columns,
    SQUARES: tl.constexpr,
    BY_VIDEO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    video = tl.program_id(0)
    column = tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float64)
    outside = 0
    for row in range(rows):
        owner = 0
        if BY_VIDEO:
            owner = tl.load(video_of_row + row)
            outside += tl.where((owner < 0) | (owner >= num_videos), 1, 0)
        mine = tl.where(owner == video, blocks, 0)
        start = partial + (column.to(tl.int64) * rows + row) * blocks
        for block in range(0, blocks, BLOCK):
            total += tl.load(start + block + lane, mask=block + lane < mine, other=0.0)
    result = tl.sum(total)
    # Looking at video_of_row on the host would stop the stream, so an owner that does not exist shows here.
    unmeasured = outside > 0
    if not SQUARES:
        unmeasured = unmeasured | ((column >= 3) & (column < 7))
    tl.store(sums + video * columns + column, tl.where(unmeasured, float("nan"), result))


def combine_sums(
    partial: torch.Tensor, video_of_row: torch.Tensor | None, num_videos: int, *, squares: bool
) -> torch.Tensor:
    columns, rows, blocks = partial.shape
    sums = torch.empty((num_videos, columns), dtype=torch.float64, device=partial.device)
    combine_sums_kernel[(num_videos, columns)](
        partial,
        video_of_row,
        sums,
        rows,
        blocks,
        num_videos,
        columns,
        SQUARES=squares,
        BY_VIDEO=video_of_row is not None,
        BLOCK=1024,
        num_warps=4,
    )
    return sums

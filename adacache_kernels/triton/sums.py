# SPDX-License-Identifier: Apache-2.0
"""Shared by the meters: the sums of one program, as tuples of columns, and their reduction to the sums of the
videos.

Elements of one thread and frame are summed in float32, everything else in float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def no_sums(
    PLACES: tl.constexpr,
    CHANNELS: tl.constexpr,
    STRIDES: tl.constexpr,
    SQUARES: tl.constexpr,
    VECTOR: tl.constexpr,
    PASSES: tl.constexpr = 1,
):
    """Zeros for each measured column, for tiles of [PLACES, CHANNELS]."""
    sums = ()
    for column in tl.static_range((7 if SQUARES else 3) + 2 * len(STRIDES)):
        if VECTOR > 1:
            sums = sums + (tl.zeros([PLACES // PASSES, CHANNELS // VECTOR], dtype=tl.float64),)
        else:
            sums = sums + (tl.zeros([CHANNELS], dtype=tl.float64),)
    return sums


@triton.jit
def sum_in_thread(tile, VECTOR: tl.constexpr, PASSES: tl.constexpr = 1):
    """Sum the elements of each thread: VECTOR contiguous channels in each of PASSES groups of places; with
    VECTOR 1 all places of a channel."""
    if VECTOR == 1:
        return tl.sum(tile, 0)
    else:
        places: tl.constexpr = tile.shape[0] // PASSES
        by_vector = tl.sum(tl.reshape(tile, [PASSES, places, tile.shape[1] // VECTOR, VECTOR]), 3)
        return tl.sum(by_vector, 0)


@triton.jit
def measure(new, old, SQUARES: tl.constexpr, VECTOR: tl.constexpr, PASSES: tl.constexpr = 1):
    """The columns without motion, for one tile of one frame."""
    diff = new - old
    sums = (
        sum_in_thread(tl.abs(diff), VECTOR, PASSES),
        sum_in_thread(tl.abs(old), VECTOR, PASSES),
        sum_in_thread(tl.abs(new), VECTOR, PASSES),
    )
    if SQUARES:
        sums = sums + (
            sum_in_thread(diff * diff, VECTOR, PASSES),
            sum_in_thread(old * old, VECTOR, PASSES),
            sum_in_thread(new * new, VECTOR, PASSES),
            sum_in_thread(new * old, VECTOR, PASSES),
        )
    return sums


@triton.jit
def measure_motion(new, earlier, paired, VECTOR: tl.constexpr, PASSES: tl.constexpr = 1):
    """The two columns of one stride; 0 if not `paired` with an earlier frame."""
    return (
        tl.where(paired, sum_in_thread(tl.abs(new - earlier), VECTOR, PASSES), 0.0),
        tl.where(paired, sum_in_thread(tl.abs(new) + tl.abs(earlier), VECTOR, PASSES), 0.0),
    )


@triton.jit
def add_sums(sums, more):
    """Add columns, in the dtype of `sums`."""
    added = ()
    for column in tl.static_range(len(sums)):
        added = added + (sums[column] + more[column].to(sums[column].dtype),)
    return added


@triton.jit
def store_sums(partial, sums, exists, row, rows, block, blocks, SQUARES: tl.constexpr):
    """Store the sums of one program to [columns, rows, blocks]; NaN if the row index is out of range."""
    for index in tl.static_range(len(sums)):
        column = index if SQUARES or index < 3 else index + 4
        total = tl.where(exists, tl.sum(sums[index]), float("nan"))
        tl.store(partial + (column * rows + row) * blocks + block, total)


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
    # Without SQUARES, columns 3 to 6 of `partial` are not written.
    wrong = 0
    items = rows.to(tl.int64) * blocks
    if not SQUARES:
        wrong += tl.where((column >= 3) & (column < 7), 1, 0)
        items = tl.where(wrong > 0, 0, items)
    if BY_VIDEO:
        # Reading video_of_row on the host would synchronize; out-of-range ids give NaN.
        for row in range(0, rows, BLOCK):
            owner = tl.load(video_of_row + row + lane, mask=row + lane < rows, other=0)
            wrong += tl.sum(tl.where((owner < 0) | (owner >= num_videos), 1, 0))
    start = partial + column.to(tl.int64) * rows * blocks
    total = tl.zeros([BLOCK], dtype=tl.float64)
    for first in range(0, items, BLOCK):
        item = first + lane
        mine = item < items
        if BY_VIDEO:
            owner = tl.load(video_of_row + item // blocks, mask=mine, other=0)
            mine = mine & (owner == video)
        total += tl.load(start + item, mask=mine, other=0.0)
    result = tl.where(wrong > 0, float("nan"), tl.sum(total))
    tl.store(sums + video * columns + column, result)


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

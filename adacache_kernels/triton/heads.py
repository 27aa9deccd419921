# SPDX-License-Identifier: Apache-2.0
"""Shared by the attention kernels: heads in tiles with power-of-two widths, their norm and rotation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

#: Rotated channel pairs: none, (2i, 2i + 1), or (i, i + dim / 2).
NONE, INTERLEAVED, HALVES = 0, 1, 2

_INTERLEAVED = tl.constexpr(INTERLEAVED)
_HALVES = tl.constexpr(HALVES)


@dataclass(frozen=True)
class HeadTiles:
    """A head of dim channels in one or two tiles: channels [0, split) in the first, the others in the second.

    For dim = 72, tiles of 64 and 16 waste less work than one of 128.
    """

    first: int
    second: int  # 0: none
    split: int


def head_tiles(dim: int, rope: int, element_size: int) -> HeadTiles:
    if rope == HALVES:  # rotates the halves elementwise
        width = max(16, triton.next_power_of_2(dim // 2))
        return HeadTiles(width, width, dim // 2)
    whole = max(16, triton.next_power_of_2(dim))
    first = whole // 2
    second = max(16, triton.next_power_of_2(dim - first))
    # float32 products hold the whole width of a tile in the registers of a thread.
    if dim > 16 and (first + second < whole or (element_size == 4 and dim > 64)):
        return HeadTiles(first, second, first)
    return HeadTiles(whole, 0, dim)


def rope_kind(cos: torch.Tensor | None, interleaved: bool) -> int:
    return NONE if cos is None else INTERLEAVED if interleaved else HALVES


@triton.jit
def load_head(
    pointers,  # [rows, 1]: the start of the head of each row
    mask,  # [rows, 1]
    DIM: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """The tiles of a head; the second is unused if SECOND is 0."""
    a_column = tl.arange(0, FIRST)[None, :]
    a = tl.load(pointers + a_column, mask=mask & (a_column < SPLIT), other=0.0)
    b = a
    if SECOND:
        b_column = tl.arange(0, SECOND)[None, :]
        b = tl.load(pointers + SPLIT + b_column, mask=mask & (b_column < DIM - SPLIT), other=0.0)
    return a, b


@triton.jit
def store_head(
    pointers,
    mask,
    a,
    b,
    DIM: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    SPLIT: tl.constexpr,
):
    a_column = tl.arange(0, FIRST)[None, :]
    tl.store(pointers + a_column, a, mask=mask & (a_column < SPLIT))
    if SECOND:
        b_column = tl.arange(0, SECOND)[None, :]
        tl.store(pointers + SPLIT + b_column, b, mask=mask & (b_column < DIM - SPLIT))


@triton.jit
def load_weight(
    weight,
    DIM: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    SPLIT: tl.constexpr,
    NORM: tl.constexpr,
):
    """The tiles of the norm weight; they broadcast over rows."""
    a = 0.0
    b = 0.0
    if NORM:
        all_rows = tl.full([1, 1], 1, tl.int1)
        a, b = load_head(weight + tl.zeros([1, 1], tl.int32), all_rows, DIM, FIRST, SECOND, SPLIT)
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return a, b


@triton.jit
def load_angles(
    table,
    angle,  # [rows, 1]: table row of each row
    mask,
    DIM: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    SPLIT: tl.constexpr,
    ROPE: tl.constexpr,
):
    """The cosines or sines of the pairs of each tile; with HALVES both tiles have the same ones."""
    PAIRS: tl.constexpr = DIM // 2
    a = 0.0
    b = 0.0
    if ROPE == _HALVES:
        column = tl.arange(0, FIRST)[None, :]
        a = tl.load(table + angle * PAIRS + column, mask=mask & (column < PAIRS), other=0.0)
        b = a
    if ROPE == _INTERLEAVED:
        column = tl.arange(0, FIRST // 2)[None, :]
        a = tl.load(table + angle * PAIRS + column, mask=mask & (column < SPLIT // 2), other=0.0)
        b = a
        if SECOND:
            column = tl.arange(0, SECOND // 2)[None, :]
            rest = mask & (column < PAIRS - SPLIT // 2)
            b = tl.load(table + angle * PAIRS + SPLIT // 2 + column, mask=rest, other=0.0)
    return a, b


@triton.jit
def norm_and_rope(
    a,
    b,
    a_weight,
    b_weight,
    a_cos,
    b_cos,
    a_sin,
    b_sin,
    eps,
    DIM: tl.constexpr,
    SECOND: tl.constexpr,
    NORM: tl.constexpr,
    ROPE: tl.constexpr,
):
    """x * rsqrt(mean(x^2) + eps) * weight over a head, then rotation, in float32."""
    a = a.to(tl.float32)
    b = b.to(tl.float32)
    if NORM:
        squares = tl.sum(a * a, 1)
        if SECOND:
            squares += tl.sum(b * b, 1)
        factor = tl.rsqrt(squares / DIM + eps)[:, None]
        a = a * factor * a_weight
        b = b * factor * b_weight
    if ROPE == _HALVES:
        turned = a * a_cos - b * a_sin
        b = a * a_sin + b * a_cos
        a = turned
    if ROPE == _INTERLEAVED:
        a = rotate_pairs(a, a_cos, a_sin)
        if SECOND:
            b = rotate_pairs(b, b_cos, b_sin)
    return a, b


@triton.jit
def rotate_pairs(x, cos, sin):
    even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    turned = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    return tl.reshape(turned, [x.shape[0], x.shape[1]])

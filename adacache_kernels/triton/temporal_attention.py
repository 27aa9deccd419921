# SPDX-License-Identifier: Apache-2.0
"""Attention over the frames of each place, read from the packed qkv tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .heads import (
    HeadTiles,
    head_tiles,
    load_angles,
    load_head,
    load_weight,
    norm_and_rope,
    rope_kind,
    store_head,
)
from .launch import on_device
from .numeric import INTERPRETED, round_to

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def temporal_attention_kernel(
    qkv,
    q_weight,
    k_weight,
    cos,
    sin,
    out,
    frames,
    places,
    heads,
    qkv_row,
    qkv_token,
    out_row,
    out_token,
    angle_frame,  # row of the angles: frame * angle_frame + place * angle_place
    angle_place,
    eps,
    scale,
    DIM: tl.constexpr,
    NORM: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK: tl.constexpr,  # frames per block of queries and of keys
    WHOLE: tl.constexpr,  # one block has all frames
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    SPLIT: tl.constexpr,
):
    # A program computes one head of one place, for all frames or a block of them. Programs of other heads of
    # the place are consecutive and share its cache lines.
    dtype: tl.constexpr = out.dtype.element_ty
    head = tl.program_id(0) % heads
    place = (tl.program_id(0) // heads % places).to(tl.int64)
    row = (tl.program_id(0) // heads // places).to(tl.int64)
    part = tl.full([], heads, tl.int64) * DIM  # from queries to keys to values
    qkv += row * qkv_row + place * qkv_token + head * DIM
    out += row * out_row + place * out_token + head * DIM
    frame = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[:, None]
    mask = frame < frames
    from_first = frame * tl.full([], places, tl.int64)

    a, b = load_head(qkv + from_first * qkv_token, mask, DIM, FIRST, SECOND, SPLIT)
    a_weight, b_weight = load_weight(q_weight, DIM, FIRST, SECOND, SPLIT, NORM)
    angle = frame * angle_frame + place * angle_place
    a_cos, b_cos = load_angles(cos, angle, mask, DIM, FIRST, SECOND, SPLIT, ROPE)
    a_sin, b_sin = load_angles(sin, angle, mask, DIM, FIRST, SECOND, SPLIT, ROPE)
    a, b = norm_and_rope(a, b, a_weight, b_weight, a_cos, b_cos, a_sin, b_sin, eps, DIM, SECOND, NORM, ROPE)
    qa = round_to(a, dtype)
    qb = round_to(b, dtype)

    a_weight, b_weight = load_weight(k_weight, DIM, FIRST, SECOND, SPLIT, NORM)
    sum_a = tl.zeros([BLOCK, FIRST], tl.float32)
    sum_b = tl.zeros([BLOCK, max(SECOND, 16)], tl.float32)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    sum_of_weights = tl.zeros([BLOCK], tl.float32)
    for first_key in range(0, 1 if WHOLE else frames, BLOCK):
        if not WHOLE:
            frame = first_key + tl.arange(0, BLOCK)[:, None]
            mask = frame < frames
            from_first = frame * tl.full([], places, tl.int64)
            angle = frame * angle_frame + place * angle_place
            a_cos, b_cos = load_angles(cos, angle, mask, DIM, FIRST, SECOND, SPLIT, ROPE)
            a_sin, b_sin = load_angles(sin, angle, mask, DIM, FIRST, SECOND, SPLIT, ROPE)
        at = qkv + part + from_first * qkv_token
        a, b = load_head(at, mask, DIM, FIRST, SECOND, SPLIT)
        va, vb = load_head(at + part, mask, DIM, FIRST, SECOND, SPLIT)
        a, b = norm_and_rope(
            a, b, a_weight, b_weight, a_cos, b_cos, a_sin, b_sin, eps, DIM, SECOND, NORM, ROPE
        )
        scores = tl.zeros([BLOCK, BLOCK], tl.float32)
        scores = product(qa, tl.trans(round_to(a, dtype)), scores)
        if SECOND:
            scores = product(qb, tl.trans(round_to(b, dtype)), scores)
        known = first_key + tl.arange(0, BLOCK)[None, :] < frames
        scores = tl.where(known, scores * scale, float("-inf"))
        if not WHOLE:  # rescale previous sums to the new maximum
            before = largest
            largest = tl.maximum(before, tl.max(scores, 1))
            rescale = tl.exp(before - largest)
            sum_of_weights *= rescale
            sum_a *= rescale[:, None]
            sum_b *= rescale[:, None]
        else:
            largest = tl.max(scores, 1)
        weights = tl.exp(scores - largest[:, None])
        sum_of_weights += tl.sum(weights, 1)
        weights = round_to(weights, dtype)
        sum_a = product(weights, va, sum_a)
        if SECOND:
            sum_b = product(weights, vb, sum_b)

    frame = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[:, None]
    inverse = (1.0 / sum_of_weights)[:, None]
    store_head(
        out + frame * tl.full([], places, tl.int64) * out_token,
        frame < frames,
        round_to(sum_a * inverse, dtype),
        round_to(sum_b * inverse, dtype),
        DIM,
        FIRST,
        SECOND,
        SPLIT,
    )


@triton.jit
def product(a, b, total):
    """total + a @ b, without TF32."""
    if _INTERPRETED:  # NumPy has no bfloat16 matrix product
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@dataclass(frozen=True)
class Blocks:
    """Frames per block, whether one block has all frames, and warps per program."""

    frames: int
    whole: bool
    warps: int


def blocks_of(frames: int, tiles: HeadTiles, element_size: int) -> Blocks:
    """Tensor cores need blocks of 16 rows; a warp has registers for 16 rows of a narrow head.

    float32 products do not use tensor cores and read from shared memory, which fits 16 frames.
    """
    wide = triton.next_power_of_2(triton.cdiv(tiles.first + tiles.second, 96))
    if element_size == 4:
        return Blocks(16, frames <= 16, 2 * wide)
    rows = max(16, triton.next_power_of_2(frames))
    return Blocks(rows, True, rows // 16 * wide)


def temporal_attention(
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    interleaved: bool,
    frames: int,
    eps: float,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Launch."""
    batch, tokens, _, heads, dim = qkv.shape
    if out.numel() == 0:
        return
    places = tokens // frames
    rope = rope_kind(cos, interleaved)
    tiles = head_tiles(dim, rope, qkv.element_size())
    blocks = blocks_of(frames, tiles, qkv.element_size())
    by_token = cos is not None and cos.shape[0] != frames
    with on_device(qkv):
        temporal_attention_kernel[(batch * places * heads, triton.cdiv(frames, blocks.frames))](
            qkv,
            q_weight,
            k_weight,
            cos,
            sin,
            out,
            frames,
            places,
            heads,
            qkv.stride(0),
            qkv.stride(1),
            out.stride(0),
            out.stride(1),
            places if by_token else 1,
            1 if by_token else 0,
            eps,
            scale,
            DIM=dim,
            NORM=q_weight is not None,
            ROPE=rope,
            BLOCK=blocks.frames,
            WHOLE=blocks.whole,
            FIRST=tiles.first,
            SECOND=tiles.second,
            SPLIT=tiles.split,
            num_warps=blocks.warps,
            num_stages=1,
            enable_fp_fusion=True,
        )

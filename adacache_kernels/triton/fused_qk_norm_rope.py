# SPDX-License-Identifier: Apache-2.0
"""RMS norm and rotary embedding of queries and keys, in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .heads import head_tiles, load_angles, load_head, load_weight, norm_and_rope, rope_kind, store_head
from .launch import NUM_WARPS, on_device
from .numeric import round_to


@triton.jit(do_not_specialize=["blocks"])
def fused_qk_norm_rope_kernel(
    qkv,
    q_weight,
    k_weight,
    cos,
    sin,
    blocks,
    tokens,
    heads,
    qkv_row,
    qkv_token,
    tokens_per_angle,
    eps,
    DIM: tl.constexpr,
    NORM: tl.constexpr,
    ROPE: tl.constexpr,
    ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    SPLIT: tl.constexpr,
):
    # A program processes q and k of ROWS (token, head) pairs, heads of a token first.
    dtype: tl.constexpr = qkv.dtype.element_ty
    first = (tl.program_id(0) % blocks).to(tl.int64) * ROWS
    row = (tl.program_id(0) // blocks).to(tl.int64)
    index = (first % heads).to(tl.int32) + tl.arange(0, ROWS)[:, None]
    token = (first // heads).to(tl.int32) + index // heads
    mask = token < tokens
    part = tl.full([], heads, tl.int64) * DIM
    qkv += row * qkv_row
    at = qkv + token.to(tl.int64) * qkv_token + index % heads * DIM

    qa, qb = load_head(at, mask, DIM, FIRST, SECOND, SPLIT)
    ka, kb = load_head(at + part, mask, DIM, FIRST, SECOND, SPLIT)
    qa_weight, qb_weight = load_weight(q_weight, DIM, FIRST, SECOND, SPLIT, NORM)
    ka_weight, kb_weight = load_weight(k_weight, DIM, FIRST, SECOND, SPLIT, NORM)
    angle = (token // tokens_per_angle).to(tl.int64)
    a_cos, b_cos = load_angles(cos, angle, mask, DIM, FIRST, SECOND, SPLIT, ROPE)
    a_sin, b_sin = load_angles(sin, angle, mask, DIM, FIRST, SECOND, SPLIT, ROPE)
    qa, qb = norm_and_rope(
        qa, qb, qa_weight, qb_weight, a_cos, b_cos, a_sin, b_sin, eps, DIM, SECOND, NORM, ROPE
    )
    ka, kb = norm_and_rope(
        ka, kb, ka_weight, kb_weight, a_cos, b_cos, a_sin, b_sin, eps, DIM, SECOND, NORM, ROPE
    )
    # Several threads may load an element that one of them stores; all must have loaded it first.
    tl.debug_barrier()
    store_head(at, mask, round_to(qa, dtype), round_to(qb, dtype), DIM, FIRST, SECOND, SPLIT)
    store_head(at + part, mask, round_to(ka, dtype), round_to(kb, dtype), DIM, FIRST, SECOND, SPLIT)


def rows_per_program(first: int, second: int) -> int:
    """About 16 elements of q and 16 of k per thread."""
    return max(1, NUM_WARPS * 32 * 16 // triton.next_power_of_2(first + second))


def fused_qk_norm_rope(
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    interleaved: bool,
    eps: float,
) -> None:
    """Launch."""
    batch, tokens, _, heads, dim = qkv.shape
    rope = rope_kind(cos, interleaved)
    norm = q_weight is not None
    if qkv.numel() == 0 or not (norm or rope):
        return
    tiles = head_tiles(dim, rope, qkv.element_size())
    rows = rows_per_program(tiles.first, tiles.second)
    blocks = triton.cdiv(tokens * heads, rows)
    with on_device(qkv):
        fused_qk_norm_rope_kernel[(batch * blocks,)](
            qkv,
            q_weight,
            k_weight,
            cos,
            sin,
            blocks,
            tokens,
            heads,
            qkv.stride(0),
            qkv.stride(1),
            1 if cos is None else tokens // cos.shape[0],
            eps,
            DIM=dim,
            NORM=norm,
            ROPE=rope,
            ROWS=rows,
            FIRST=tiles.first,
            SECOND=tiles.second,
            SPLIT=tiles.split,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )

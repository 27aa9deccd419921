"""Allegro (arXiv 2410.15458), and Sana-Video, whose blocks are gated alike."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from adacache.adapters.blocks import Arguments, BlockAdapter, Seen, Watched


def gated_attention(block: Any, seen: Seen, given: Arguments) -> Tensor:
    """gate * attention, the gate from the block's table and the timestep embedding [B, 6 * C] or
    [B, 1|N, 6 * C]."""
    time = given["temb"] if "temb" in given else given["timestep"]
    time = time.reshape(time.shape[0], -1, 6, time.shape[-1] // 6)
    return (block.scale_shift_table[2] + time[:, :, 2]) * seen["attn1"]


class AllegroAdapter(BlockAdapter):
    classes = ("AllegroTransformer3DModel",)
    shared = ("image_rotary_emb",)
    parts = (Watched("attention", "transformer_blocks", ("attn1",), gated_attention),)


class SanaVideoAdapter(AllegroAdapter):
    classes = ("SanaVideoTransformer3DModel",)
    shared = ("rotary_emb",)

"""Kandinsky 5: blocks over the video's tokens, with three gates each."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from adacache.adapters.blocks import Arguments, BlockAdapter, BlockList, Seen, Watched


def gated_attention(block: Any, seen: Seen, given: Arguments) -> Tensor:
    gate = seen["visual_modulation"].unsqueeze(1).chunk(9, dim=-1)[2]
    return gate.float() * seen["self_attention"].float()


class Kandinsky5Adapter(BlockAdapter):
    classes = ("Kandinsky5Transformer3DModel",)
    lists = (BlockList("visual_transformer_blocks"),)
    streams = ("visual_embed",)
    shared = ("sparse_params",)
    frame_axis = 1
    parts = (
        Watched(
            "attention", "visual_transformer_blocks", ("visual_modulation", "self_attention"), gated_attention
        ),
    )

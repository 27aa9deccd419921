"""Vchitect 2.0 as in `videosys`: frames lie in the batch of blocks that attend in space, in time and to the
text at once. The model takes one video a call."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from adacache.adapters.blocks import Arguments, BlockAdapter, BlockList, Seen, Watched


def gated_attention(block: Any, seen: Seen, given: Arguments) -> Tensor:
    gate: Tensor = seen["norm1"][1]
    return gate.unsqueeze(1) * seen["attn"][0]


class VchitectAdapter(BlockAdapter):
    classes = ("VchitectXLTransformerModel",)
    lists = (BlockList("transformer_blocks", fold="spatial"),)
    streams = ("hidden_states", "encoder_hidden_states")
    video_last = True
    shared = ("freqs_cis",)
    frame_axis = 1
    parts = (Watched("attention", "transformer_blocks", ("norm1", "attn"), gated_attention),)

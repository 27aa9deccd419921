"""Latte (arXiv 2401.03048) and Open-Sora-Plan 1.1: a spatial block, a temporal block, a spatial block ..."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from adacache.adapters.blocks import Arguments, BlockAdapter, BlockList, Place, Watched


def gated_attention(block: Any, seen: dict[str, Any], given: Arguments) -> Tensor:
    """gate * attention, the gate from the block's table and the timestep embedding."""
    time = given["timestep"]
    gate = (block.scale_shift_table[None] + time.reshape(time.shape[0], 6, -1)).chunk(6, dim=1)[2]
    return gate * seen["attn1"]


class LatteAdapter(BlockAdapter):
    classes = ("LatteTransformer3DModel", "LatteT2V")  # diffusers'; the projects' own, also in videosys
    lists = (
        BlockList("transformer_blocks", "spatial", "spatial"),
        BlockList("temporal_transformer_blocks", "temporal", "temporal"),
    )
    alternating = True
    parts = (
        Watched("temporal_attention", "temporal_transformer_blocks", ("attn1",), gated_attention),
        Watched("spatial_attention", "transformer_blocks", ("attn1",), gated_attention),
    )
    default_part = "temporal_attention"

    def when_reusing(self, given: Arguments) -> Arguments:
        # Else tokens would be turned from frames to places and back between blocks that do nothing.
        return {"enable_temporal_attentions": False}

    def applies(self, order: Sequence[Place]) -> Place:
        return next(place for place in reversed(order) if place.blocks.kind == "spatial")

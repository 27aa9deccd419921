"""Latte (arXiv 2401.03048), for text and without, and Open-Sora-Plan 1.1: a spatial block, a temporal block,
a spatial block ..."""

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
    shared = ("all_timesteps",)
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


def gated_attention_of_one_list(block: Any, seen: dict[str, Any], given: Arguments) -> Tensor:
    """gate * attention, the gate from the block's own layer."""
    gate: Tensor = seen["adaLN_modulation"].chunk(6, dim=1)[2]
    return gate.unsqueeze(1) * seen["attn"]


class LatteOfOneListAdapter(BlockAdapter):
    """Latte without text: both kinds of block stand in one list."""

    classes = ("Latte",)
    lists = (
        BlockList("blocks", "spatial", "spatial", turn=0),
        BlockList("blocks", "temporal", "temporal", turn=1),
    )
    alternating = True
    streams = ("x",)
    latents = "x"
    timestep = "t"
    frame_axis = 1
    parts = (
        Watched(
            "temporal_attention", "blocks[1::2]", ("adaLN_modulation", "attn"), gated_attention_of_one_list
        ),
        Watched(
            "spatial_attention", "blocks[0::2]", ("adaLN_modulation", "attn"), gated_attention_of_one_list
        ),
    )
    default_part = "temporal_attention"

    def matches(self, model: object) -> bool:
        # Open-Sora has a class of the same name and another structure.
        return super().matches(model) and hasattr(model, "temp_embed")

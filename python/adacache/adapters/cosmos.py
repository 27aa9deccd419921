"""Cosmos (arXiv 2501.03575): all three sub-layers gated, each gate from its norm."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from adacache.adapters.blocks import Arguments, BlockAdapter, Seen, Watched


def gated_attention(block: Any, seen: Seen, given: Arguments) -> Tensor:
    gate: Tensor = seen["norm1"][1]
    return gate * seen["attn1"]


class CosmosAdapter(BlockAdapter):
    classes = ("CosmosTransformer3DModel",)
    shared = ("image_rotary_emb",)
    parts = (Watched("attention", "transformer_blocks", ("norm1", "attn1"), gated_attention),)

"""Wan 2.1 and 2.2 (arXiv 2503.20314) and the models built on it: one list of blocks over all tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from adacache.adapters.blocks import Arguments, BlockAdapter, BlockList, Seen, Watched


def gated_attention(block: Any, seen: Seen, given: Arguments) -> Tensor:
    """attention * gate in float32, the gate from the block's table and the timestep embedding: one per row
    [B, 6, C], or per token [B, N, 6, C] (Wan 2.2 with a given image) or [B, 6, N, C] (SkyReels)."""
    time, table = given["temb"], block.scale_shift_table[:, 2:3]
    by_token = time.ndim == 4 and time.shape[1] != 6
    gate = time[:, :, 2] if by_token else time[:, 2] if time.ndim == 4 else time[:, 2:3]
    return seen["attn1"] * (table + gate.float())


class WanAdapter(BlockAdapter):
    classes: tuple[str, ...] = (
        "WanTransformer3DModel",
        "ChronoEditTransformer3DModel",
        "SkyReelsV2Transformer3DModel",
    )
    lists = (BlockList("blocks"),)
    shared = ("rotary_emb", "attention_mask")
    parts = (Watched("attention", "blocks", ("attn1",), gated_attention),)


class ControlledWanAdapter(WanAdapter):
    """VACE and Animate: what controls the video is added between the blocks, at reused steps too."""

    classes = ("WanVACETransformer3DModel", "WanAnimateTransformer3DModel")
    between = True


def gated_attention_of_new_tokens(block: Any, seen: Seen, given: Arguments) -> Tensor:
    """That of the frames that are made, whose tokens stand last."""
    return gated_attention(block, seen, given)[:, -given["original_context_length"] :]


class HeliosAdapter(BlockAdapter):
    """Helios: Wan's blocks over the tokens of earlier frames and of those that are made."""

    classes = ("HeliosTransformer3DModel",)
    lists = (BlockList("blocks"),)
    parts = (Watched("attention", "blocks", ("attn1",), gated_attention_of_new_tokens),)

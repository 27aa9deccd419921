"""LTX-Video (arXiv 2501.00103)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from adacache.adapters.blocks import Arguments, BlockAdapter, Seen, Watched


def gated_attention(block: Any, seen: Seen, given: Arguments) -> Tensor:
    """attention * gate, the gate from the block's table and the timestep embedding [B, 1|N, 6 * C]."""
    table, time = block.scale_shift_table, given["temb"]
    gate = table[2].to(time.device) + time.unflatten(2, (table.shape[0], -1))[:, :, 2]
    return seen["attn1"] * gate


class LTXVideoAdapter(BlockAdapter):
    classes = ("LTXVideoTransformer3DModel",)
    parts = (Watched("attention", "transformer_blocks", ("attn1",), gated_attention),)

    def frames(self, model: Any, given: Arguments) -> int:
        return given.get("num_frames") or 1


class LTX2VideoAdapter(BlockAdapter):
    """LTX-2: tokens of the video and of its sound run through the blocks together, and both are kept."""

    classes = ("LTX2VideoTransformer3DModel",)
    streams = ("hidden_states", "audio_hidden_states")
    parts = (Watched("attention", "transformer_blocks", ("attn1",), gated_attention),)

    def frames(self, model: Any, given: Arguments) -> int:
        return given.get("num_frames") or 1

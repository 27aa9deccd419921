"""CogVideoX (arXiv 2408.06072), ConsisID and EasyAnimate: video and text attend to each other, both gated."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from adacache.adapters.blocks import Arguments, BlockAdapter, Seen, Watched


def gated_attention(block: Any, seen: Seen, given: Arguments) -> Tensor:
    """gate * attention of the video's tokens; the first norm returns the gate, [B, 1, C] or [B, C]."""
    gate = seen["norm1"][2]
    return (gate if gate.ndim == 3 else gate.unsqueeze(1)) * seen["attn1"][0]


class CogVideoXAdapter(BlockAdapter):
    classes: tuple[str, ...] = ("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel")
    streams = ("hidden_states", "encoder_hidden_states")
    shared = ("image_rotary_emb",)
    frame_axis = 1
    parts = (Watched("attention", "transformer_blocks", ("norm1", "attn1"), gated_attention),)


class EasyAnimateAdapter(CogVideoXAdapter):
    classes = ("EasyAnimateTransformer3DModel",)
    frame_axis = 2

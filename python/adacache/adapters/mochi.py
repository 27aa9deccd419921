"""Mochi 1: video and text streams; the gate, under a tanh, sits inside a norm of the attention's output."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from adacache.adapters.blocks import Arguments, BlockAdapter, Seen, Watched


def gated_attention(block: Any, seen: Seen, given: Arguments) -> Tensor:
    attention: Tensor = seen["norm2"]
    return attention


class MochiAdapter(BlockAdapter):
    classes = ("MochiTransformer3DModel",)
    streams = ("hidden_states", "encoder_hidden_states")
    shared = ("image_rotary_emb",)
    parts = (Watched("attention", "transformer_blocks", ("norm2",), gated_attention),)

    def frames(self, model: Any, given: Arguments) -> int:
        return int(given["hidden_states"].shape[2])

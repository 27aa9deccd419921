# SPDX-License-Identifier: Apache-2.0
"""The block of CogVideoX in diffusers: joint attention and a joint MLP of text and video, both gated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from adacache.fused.forwards import UNKNOWN_NORMS, runs
from adacache.fused.norms import ModelNorm
from adacache.fused.program import Add

NORM_FORWARDS = frozenset({"2212e5fff5c8fd7d"})  # CogVideoXLayerNormZero of diffusers 0.42.1


class CogVideoXBlock:
    """See `BlockProgram`."""

    parts: tuple[str, ...] = ("attention", "mlp")
    forwards = frozenset({"5c4ad9e7a7dac0a7", "2ce7d8e655d37f83"})  # CogVideoX, ConsisID; diffusers 0.42.1

    def refuses(self, block: Any) -> str | None:
        known = all(runs(norm, NORM_FORWARDS) for norm in (block.norm1, block.norm2))
        return None if known else UNKNOWN_NORMS

    def takes(self, block: Any, given: Mapping[str, Any]) -> bool:
        return True

    def run(self, block: Any, given: Mapping[str, Any], add: Add) -> tuple[Tensor, Tensor]:
        x, text, time = (given[name] for name in ("hidden_states", "encoder_hidden_states", "temb"))
        words = text.shape[1]
        norm, text_norm, gate, text_gate = _modulation(block.norm1, time)
        y, text_y = block.attn1(
            hidden_states=add.norm(x, norm),
            encoder_hidden_states=add.norm(text, text_norm),
            image_rotary_emb=given.get("image_rotary_emb"),
            **(given.get("attention_kwargs") or {}),
        )
        norm, text_norm, gate_mlp, text_gate_mlp = _modulation(block.norm2, time)
        joint = x.new_empty(x.shape[0], words + x.shape[1], x.shape[2])
        x, _ = add("attention", x, y, gate, norm, joint[:, words:])
        text, _ = add("text_attention", text, text_y, text_gate, text_norm, joint[:, :words])
        y = block.ff(joint)
        x, _ = add("mlp", x, y[:, words:], gate_mlp)
        text, _ = add("text_mlp", text, y[:, :words], text_gate_mlp)
        return x, text


def _modulation(module: Any, time: Tensor) -> tuple[ModelNorm, ModelNorm, Tensor, Tensor]:
    """The norms of video and text, and the gates of what comes after them."""
    parts = module.linear(module.silu(time)).unsqueeze(1).chunk(6, dim=2)
    shift, scale, gate, text_shift, text_scale, text_gate = parts
    video, text = ModelNorm(module.norm, shift, scale), ModelNorm(module.norm, text_shift, text_scale)
    return video, text, gate, text_gate

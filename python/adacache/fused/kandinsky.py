# SPDX-License-Identifier: Apache-2.0
"""The block of Kandinsky 5 in diffusers: three gated sub-layers; gates, norms and residuals in float32 beside
a stream of any dtype."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from adacache.fused.norms import ModelNorm
from adacache.fused.program import Add
from adacache.fused.residuals import FLOATS


class KandinskyBlock:
    """See `BlockProgram`."""

    parts: tuple[str, ...] = ("attention", "cross_attention", "mlp")
    forwards = frozenset({"0733d74ea8335873"})  # diffusers 0.42.1

    def refuses(self, block: Any) -> str | None:
        return None

    def takes(self, block: Any, given: Mapping[str, Any]) -> bool:
        x, time = given["visual_embed"], given.get("time_embed")
        return x.ndim == 3 and x.dtype in FLOATS and isinstance(time, Tensor) and time.ndim == 2

    def run(self, block: Any, given: Mapping[str, Any], add: Add) -> Tensor:
        x: Tensor = given["visual_embed"].contiguous()
        parts = block.visual_modulation(given["time_embed"]).unsqueeze(1).float().chunk(9, dim=-1)
        norm, norm_cross, norm_mlp = (
            ModelNorm(module, shift, scale, float32=True)
            for module, shift, scale in zip(
                (block.self_attention_norm, block.cross_attention_norm, block.feed_forward_norm),
                parts[0::3],
                parts[1::3],
                strict=True,
            )
        )
        gate, gate_cross, gate_mlp = parts[2::3]
        y = block.self_attention(
            add.norm(x, norm), rotary_emb=given["rope"], sparse_params=given["sparse_params"]
        )
        x, normed = add("attention", x, y, gate, norm_cross, rounding="float32")
        y = block.cross_attention(normed, encoder_hidden_states=given["text_embed"])
        x, normed = add("cross_attention", x, y, gate_cross, norm_mlp, rounding="float32")
        return add("mlp", x, block.feed_forward(normed), gate_mlp, rounding="float32")[0]

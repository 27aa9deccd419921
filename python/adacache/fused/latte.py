# SPDX-License-Identifier: Apache-2.0
"""The block of Latte in diffusers: attention over places or over frames, cross-attention over places, MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from adacache.fused.norms import ModelNorm
from adacache.fused.program import Add


class LatteBlock:
    """See `BlockProgram`."""

    parts: tuple[str, ...] = ("attention", "cross_attention", "mlp")
    forwards = frozenset({"3d85c2d21b9c32bd"})  # diffusers 0.42.1

    def refuses(self, block: Any) -> str | None:
        if block.norm_type != "ada_norm_single":
            return f"its norm is {block.norm_type!r}"
        if block.pos_embed is not None or block.only_cross_attention:
            return "it has another attention than Latte's"
        return "its feed-forward is chunked" if block._chunk_size is not None else None

    def takes(self, block: Any, given: Mapping[str, Any]) -> bool:
        x, time = given["hidden_states"], given.get("timestep")
        return x.ndim == 3 and isinstance(time, Tensor) and not given.get("cross_attention_kwargs")

    def run(self, block: Any, given: Mapping[str, Any], add: Add) -> Tensor:
        x: Tensor = given["hidden_states"]
        modulation = block.scale_shift_table[None] + given["timestep"].reshape(x.shape[0], 6, -1)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=1)
        normed = add.norm(x, ModelNorm(block.norm1, shift, scale))
        y = block.attn1(normed, encoder_hidden_states=None, attention_mask=given.get("attention_mask"))
        norm_mlp = ModelNorm(block.norm2, shift_mlp, scale_mlp)
        if block.attn2 is None:
            x, before_mlp = add("attention", x, y, gate, norm_mlp)
        else:
            x, _ = add("attention", x, y, gate)
            y = block.attn2(
                x,
                encoder_hidden_states=given.get("encoder_hidden_states"),
                attention_mask=given.get("encoder_attention_mask"),
            )
            x, before_mlp = add("cross_attention", x, y, None, norm_mlp)
        return add("mlp", x, block.ff(before_mlp), gate_mlp)[0]

# SPDX-License-Identifier: Apache-2.0
"""The block of Allegro in diffusers: a table of modulators plus a timestep embedding per video."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from adacache.fused.norms import ModelNorm
from adacache.fused.program import Add


class AllegroBlock:
    """See `BlockProgram`."""

    parts: tuple[str, ...] = ("attention", "cross_attention", "mlp")
    forwards = frozenset({"ad669d109a614f40"})  # diffusers 0.42.1

    def refuses(self, block: Any) -> str | None:
        return None

    def takes(self, block: Any, given: Mapping[str, Any]) -> bool:
        x: Tensor = given["hidden_states"]
        # The model squeezes a single token away.
        return x.ndim == 3 and x.shape[1] > 1 and isinstance(given.get("temb"), Tensor)

    def run(self, block: Any, given: Mapping[str, Any], add: Add) -> Tensor:
        x: Tensor = given["hidden_states"].contiguous()  # a transposed view of the embedding of one frame
        modulation = block.scale_shift_table[None] + given["temb"].reshape(x.shape[0], 6, -1)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=1)
        y = block.attn1(
            add.norm(x, ModelNorm(block.norm1, shift, scale)),
            encoder_hidden_states=None,
            attention_mask=given.get("attention_mask"),
            image_rotary_emb=given.get("image_rotary_emb"),
        )
        norm_mlp = ModelNorm(block.norm2, shift_mlp, scale_mlp)
        if block.attn2 is None:
            x, normed = add("attention", x, y, gate, norm_mlp)
        else:
            x, _ = add("attention", x, y, gate)
            y = block.attn2(
                x,
                encoder_hidden_states=given.get("encoder_hidden_states"),
                attention_mask=given.get("encoder_attention_mask"),
                image_rotary_emb=None,
            )
            x, normed = add("cross_attention", x, y, None, norm_mlp)
        return add("mlp", x, block.ff(normed), gate_mlp)[0]

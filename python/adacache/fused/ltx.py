# SPDX-License-Identifier: Apache-2.0
"""The block of LTX-Video in diffusers: RMS norms, modulators per video or per token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from adacache.fused.norms import ModelNorm
from adacache.fused.program import Add


class LTXBlock:
    """See `BlockProgram`."""

    parts: tuple[str, ...] = ("attention", "cross_attention", "mlp")
    forwards = frozenset({"2db76407a8482f91"})  # diffusers 0.42.1

    def refuses(self, block: Any) -> str | None:
        return None

    def takes(self, block: Any, given: Mapping[str, Any]) -> bool:
        time = given.get("temb")
        return given["hidden_states"].ndim == 3 and isinstance(time, Tensor) and time.ndim == 3

    def run(self, block: Any, given: Mapping[str, Any], add: Add) -> Tensor:
        x, time = given["hidden_states"], given["temb"]
        table = block.scale_shift_table[None, None].to(time.device)
        modulation = table + time.reshape(x.shape[0], time.shape[1], table.shape[2], -1)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation.unbind(2)
        y = block.attn1(
            hidden_states=add.norm(x, ModelNorm(block.norm1, shift, scale)),
            encoder_hidden_states=None,
            image_rotary_emb=given.get("image_rotary_emb"),
        )
        x, _ = add("attention", x, y, gate)
        y = block.attn2(
            x,
            encoder_hidden_states=given["encoder_hidden_states"],
            image_rotary_emb=None,
            attention_mask=given.get("encoder_attention_mask"),
        )
        x, normed = add("cross_attention", x, y, None, ModelNorm(block.norm2, shift_mlp, scale_mlp))
        return add("mlp", x, block.ff(normed), gate_mlp)[0]

# SPDX-License-Identifier: Apache-2.0
"""The block of Cosmos in diffusers: three gated sub-layers, modulators per video or per token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from adacache.fused.forwards import UNKNOWN_NORMS, runs
from adacache.fused.norms import ModelNorm
from adacache.fused.program import Add

NORM_FORWARDS = frozenset({"3fe406e9e6b971cf"})  # CosmosAdaLayerNormZero of diffusers 0.42.1


class CosmosBlock:
    """See `BlockProgram`."""

    parts: tuple[str, ...] = ("attention", "cross_attention", "mlp")
    forwards = frozenset({"a89a467de35e25a0"})  # diffusers 0.42.1

    def refuses(self, block: Any) -> str | None:
        if block.before_proj is not None or block.after_proj is not None:
            return "it is a block of a ControlNet"
        known = all(runs(norm, NORM_FORWARDS) for norm in (block.norm1, block.norm2, block.norm3))
        return None if known else UNKNOWN_NORMS

    def takes(self, block: Any, given: Mapping[str, Any]) -> bool:
        time = given.get("embedded_timestep")
        return given["hidden_states"].ndim == 3 and isinstance(time, Tensor) and time.ndim in (2, 3)

    def run(self, block: Any, given: Mapping[str, Any], add: Add) -> Tensor:
        x: Tensor = given["hidden_states"]
        if given.get("extra_pos_emb") is not None:
            x = x + given["extra_pos_emb"]
        norm, gate = _modulation(block.norm1, given)
        y = block.attn1(add.norm(x, norm), image_rotary_emb=given.get("image_rotary_emb"))
        norm, gate_cross = _modulation(block.norm2, given)
        x, normed = add("attention", x, y, gate, norm)
        y = block.attn2(
            normed,
            encoder_hidden_states=given["encoder_hidden_states"],
            attention_mask=given.get("attention_mask"),
        )
        norm, gate_mlp = _modulation(block.norm3, given)
        x, normed = add("cross_attention", x, y, gate_cross, norm)
        x, _ = add("mlp", x, block.ff(normed), gate_mlp)
        if given.get("controlnet_residual") is not None:
            x += given["controlnet_residual"]
        return x


def _modulation(module: Any, given: Mapping[str, Any]) -> tuple[ModelNorm, Tensor]:
    """The norm before a sub-layer, and the gate after it."""
    values: Tensor = module.linear_2(module.linear_1(module.activation(given["embedded_timestep"])))
    if given.get("temb") is not None:
        values = values + given["temb"]
    if values.ndim == 2:
        values = values.unsqueeze(1)
    shift, scale, gate = values.chunk(3, dim=-1)
    return ModelNorm(module.norm, shift, scale), gate

# SPDX-License-Identifier: Apache-2.0
"""The block of Sana-Video in diffusers: linear attention, an MLP of convolutions over the grid of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from adacache.fused.norms import ModelNorm
from adacache.fused.program import Add


class SanaVideoBlock:
    """See `BlockProgram`."""

    parts: tuple[str, ...] = ("attention", "cross_attention", "mlp")
    forwards = frozenset({"48ed78b1c13a1393"})  # diffusers 0.42.1

    def refuses(self, block: Any) -> str | None:
        return None if hasattr(block, "norm2") else "it has no cross-attention"

    def takes(self, block: Any, given: Mapping[str, Any]) -> bool:
        time = given.get("timestep")
        return given["hidden_states"].ndim == 3 and isinstance(time, Tensor) and time.ndim == 3

    def run(self, block: Any, given: Mapping[str, Any], add: Add) -> Tensor:
        embedded, time = given["hidden_states"], given["timestep"]
        x: Tensor = embedded.contiguous()
        table = block.scale_shift_table[None, None]
        modulation = table + time.reshape(x.shape[0], time.shape[1], 6, -1)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation.unbind(2)
        normed = add.norm(x, ModelNorm(block.norm1, shift, scale)).to(x.dtype)
        y = block.attn1(normed, rotary_emb=given.get("rotary_emb"))
        x, _ = add("attention", x, y, gate)
        y = block.attn2(
            _laid_out_as(embedded, x),
            encoder_hidden_states=given.get("encoder_hidden_states"),
            attention_mask=given.get("encoder_attention_mask"),
        )
        x, before_mlp = add("cross_attention", x, y, None, ModelNorm(block.norm2, shift_mlp, scale_mlp))
        assert before_mlp is not None
        grid = before_mlp.unflatten(1, (given["frames"], given["height"], given["width"]))
        y = block.ff(grid).flatten(1, 3).contiguous()  # channels first, from a convolution
        return add("mlp", x, y, gate_mlp)[0]


def _laid_out_as(embedded: Tensor, x: Tensor) -> Tensor:
    """The stream as the model passes it to the cross-attention. In the first block, the model's sum has the
    strides of the embedding, a transposed view; a matrix product may depend on them."""
    if embedded.stride(2) == 1:
        return x
    return x.transpose(1, 2).contiguous().transpose(1, 2)

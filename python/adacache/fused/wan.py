# SPDX-License-Identifier: Apache-2.0
"""The block of Wan in diffusers: gates, norms and residuals in float32 beside a stream of any dtype."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from adacache.fused.modules import hooked
from adacache.fused.norms import ModelNorm
from adacache.fused.program import Add
from adacache.fused.residuals import FLOATS
from adacache.interpose import is_interposed


class WanBlock:
    """See `BlockProgram`.

    Args:
        axis: dimension of the six modulators in a timestep embedding per token.
    """

    parts: tuple[str, ...] = ("attention", "cross_attention", "mlp")
    # Wan, ChronoEdit, Wan Animate; SkyReels-V2; diffusers 0.42.1
    forwards = frozenset({"a2ea5499458c1623", "951781959aa9ce07"})

    def __init__(self, axis: int):
        self._axis = axis

    def refuses(self, block: Any) -> str | None:
        return None

    def takes(self, block: Any, given: Mapping[str, Any]) -> bool:
        x, time = given["hidden_states"], given.get("temb")
        if x.ndim != 3 or not isinstance(time, Tensor) or time.ndim not in (3, 4):
            return False
        return x.dtype in FLOATS and block.scale_shift_table.dtype in FLOATS

    def run(self, block: Any, given: Mapping[str, Any], add: Add) -> Tensor:
        x: Tensor = given["hidden_states"].contiguous()  # SkyReels: a transposed view of the embedding
        parts, tables = self._modulation(block, given["temb"])
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = parts
        norm1 = ModelNorm(block.norm1, shift, scale, tables[0], tables[1], float32=True)
        norm2 = None if _is_identity(block.norm2) else ModelNorm(block.norm2, float32=True)
        norm3 = ModelNorm(block.norm3, shift_mlp, scale_mlp, tables[3], tables[4], float32=True)
        y = block.attn1(add.norm(x, norm1), None, given.get("attention_mask"), given["rotary_emb"])
        x, normed = add("attention", x, y, gate, norm2, gate_table=tables[2], rounding="float32")
        y = block.attn2(x if normed is None else normed, given["encoder_hidden_states"], None, None)
        x, normed = add("cross_attention", x, y, None, norm3)
        return add("mlp", x, block.ffn(normed), gate_mlp, gate_table=tables[5], rounding="float32")[0]

    def _modulation(self, block: Any, time: Tensor) -> tuple[list[Tensor], list[Tensor] | list[None]]:
        """Shift, scale and gate of both sub-layers [B, 1|N, C], and the tables that are added to them."""
        if time.ndim == 3:
            return list((block.scale_shift_table + time.float()).chunk(6, dim=1)), [None] * 6
        # The sum per token is formed where it is used: it has six times the size of the stream.
        return list(time.unbind(self._axis)), list(block.scale_shift_table.float().chunk(6, dim=1))


def _is_identity(module: Any) -> bool:
    return isinstance(module, nn.Identity) and not is_interposed(module) and hooked(module) is None

"""Open-Sora-Plan 1.2 and 1.3: one list of blocks over all tokens. (1.1 is Latte's network, see latte.py.)"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from adacache.adapters.blocks import Arguments, BlockAdapter, BlockList, Rows, Seen, Watched
from adacache.adapters.latte import gated_attention


def gated_attention_by_token(block: Any, seen: Seen, given: Arguments) -> Tensor:
    """gate * attention of tokens [N, B, C]."""
    time = given["timestep"].reshape(6, given["hidden_states"].shape[1], -1)
    return (block.scale_shift_table[2] + time[2]) * seen["attn1"]


class OpenSoraPlan12Adapter(BlockAdapter):
    classes = ("OpenSoraT2V",)
    parts = (Watched("attention", "transformer_blocks", ("attn1",), gated_attention),)


class OpenSoraPlan13Adapter(BlockAdapter):
    classes = ("OpenSoraT2V_v1_3",)
    lists = (BlockList("transformer_blocks", fold="tokens first"),)
    parts = (Watched("attention", "transformer_blocks", ("attn1",), gated_attention_by_token),)

    def select(self, name: str, value: Any, rows: Rows, given: Arguments) -> Any:
        if name in ("hidden_states", "encoder_hidden_states", "timestep"):
            return rows.take(value.transpose(0, 1)).transpose(0, 1)
        if name in ("attention_mask", "encoder_attention_mask") and value is not None:
            # Sparse attention splits tokens into groups: [groups * B, ...], a group's rows together.
            return (
                rows.take(value.unflatten(0, (-1, rows.batch)).transpose(0, 1)).transpose(0, 1).flatten(0, 1)
            )
        return super().select(name, value, rows, given)

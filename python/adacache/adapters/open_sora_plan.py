# SPDX-License-Identifier: Apache-2.0
"""Open-Sora-Plan 1.2 and 1.3: one list of blocks over all tokens. (1.1 has Latte's network, see latte.py.)"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from adacache.adapters.latte import gated_attention
from adacache.adapters.spec import Arguments, BlockList, GatedResidual, ModelSpec, Outputs
from adacache.rows import Split

_CHILDREN = {"attention": "attn1", "cross_attention": "attn2", "mlp": "ff"}


def gated_attention_by_token(block: Any, outputs: Outputs, given: Arguments) -> Tensor:
    """gate * attention of tokens [N, B, C]."""
    time = given["timestep"].reshape(6, given["hidden_states"].shape[1], -1)
    return (block.scale_shift_table[2] + time[2]) * outputs["attn1"]


def select(name: str, value: Any, split: Split, given: Arguments) -> Any:
    """Arguments with the tokens first, and masks by group."""
    if name in ("hidden_states", "encoder_hidden_states", "timestep"):
        return split.rows_of(value.transpose(0, 1)).transpose(0, 1)
    if name in ("attention_mask", "encoder_attention_mask") and value is not None:
        # Sparse attention splits tokens into groups: [groups * B, ...], the rows of a group together.
        groups = value.unflatten(0, (-1, split.batch)).transpose(0, 1)
        return split.rows_of(groups).transpose(0, 1).flatten(0, 1)
    return None


OPEN_SORA_PLAN_12 = ModelSpec(
    classes=("OpenSoraT2V",),
    lists=(BlockList("transformer_blocks", outputs=_CHILDREN),),
    residuals=(GatedResidual("attention", "transformer_blocks", ("attn1",), gated_attention),),
)
OPEN_SORA_PLAN_13 = ModelSpec(
    classes=("OpenSoraT2V_v1_3",),
    lists=(BlockList("transformer_blocks", layout="tokens first", outputs=_CHILDREN),),
    residuals=(GatedResidual("attention", "transformer_blocks", ("attn1",), gated_attention_by_token),),
    select=select,
)

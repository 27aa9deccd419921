# SPDX-License-Identifier: Apache-2.0
"""Wan 2.1 and 2.2 (arXiv 2503.20314) and the models built on it: one list of blocks over all tokens."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from adacache.adapters.spec import (
    Arguments,
    BlockList,
    GatedResidual,
    ModelSpec,
    Outputs,
    Spared,
    nothing,
    one_token,
)
from adacache.fused.wan import WanBlock


def gated_attention(block: Any, outputs: Outputs, given: Arguments, axis: int = 2) -> Tensor:
    """attention * gate in float32. The gate is in the block's table plus the timestep embedding: one per row
    [B, 6, C], or per token (Wan 2.2 with a given image). `axis`: that of the 6 per token."""
    time, table = given["temb"], block.scale_shift_table[:, 2:3]
    gate = time.select(axis, 2) if time.ndim == 4 else time[:, 2:3]
    return outputs["attn1"] * (table + gate.float())


def gated_attention_of_new_tokens(block: Any, outputs: Outputs, given: Arguments) -> Tensor:
    """That of the generated frames, whose tokens come last."""
    return gated_attention(block, outputs, given)[:, -given["original_context_length"] :]


_BLOCKS = (BlockList("blocks", outputs={"attention": "attn1", "cross_attention": "attn2", "mlp": "ffn"}),)

WAN = ModelSpec(
    classes=("WanTransformer3DModel", "ChronoEditTransformer3DModel"),
    lists=_BLOCKS,
    shared=("rotary_emb", "attention_mask"),
    residuals=(GatedResidual("attention", "blocks", ("attn1",), gated_attention),),
    spared=(
        Spared("condition_embedder.text_embedder", one_token),
        Spared("condition_embedder.image_embedder", one_token),
        Spared("rope", nothing),
    ),
    block_program=WanBlock(axis=2),
)
# Its timestep embedding per token is [B, 6, N, C].
SKYREELS = replace(
    WAN,
    classes=("SkyReelsV2Transformer3DModel",),
    residuals=(GatedResidual("attention", "blocks", ("attn1",), partial(gated_attention, axis=1)),),
    block_program=WanBlock(axis=1),
)
# What controls the video is added between the blocks, at reused steps too.
CONTROLLED_WAN = replace(
    WAN, classes=("WanVACETransformer3DModel", "WanAnimateTransformer3DModel"), between=True, spared=()
)
# Wan's blocks over the tokens of earlier frames and of generated ones.
HELIOS = ModelSpec(
    classes=("HeliosTransformer3DModel",),
    lists=_BLOCKS,
    residuals=(GatedResidual("attention", "blocks", ("attn1",), gated_attention_of_new_tokens),),
    whole_sequence=True,
)

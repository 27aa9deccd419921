# SPDX-License-Identifier: Apache-2.0
"""Latte (arXiv 2401.03048), with and without text, and Open-Sora-Plan 1.1: spatial and temporal blocks
alternate."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from adacache.adapters.spec import (
    Arguments,
    BlockList,
    GatedResidual,
    ModelSpec,
    Outputs,
    Spared,
    one_token,
)
from adacache.fused.latte import LatteBlock


def gated_attention(block: Any, outputs: Outputs, given: Arguments) -> Tensor:
    """gate * attention; the gate is in the block's table plus the timestep embedding."""
    time = given["timestep"]
    gate = (block.scale_shift_table[None] + time.reshape(time.shape[0], 6, -1)).chunk(6, dim=1)[2]
    return gate * outputs["attn1"]


LATTE = ModelSpec(
    # diffusers' class; the class of the Latte and Open-Sora-Plan repositories, also in videosys
    classes=("LatteTransformer3DModel", "LatteT2V"),
    lists=(
        BlockList(
            "transformer_blocks",
            "spatial",
            "spatial",
            outputs={"spatial_attention": "attn1", "cross_attention": "attn2", "mlp": "ff"},
        ),
        BlockList(
            "temporal_transformer_blocks",
            "temporal",
            "temporal",
            outputs={"temporal_attention": "attn1", "mlp": "ff"},
        ),
    ),
    alternating=True,
    shared=("all_timesteps",),
    residuals=(
        GatedResidual("temporal_attention", "temporal_transformer_blocks", ("attn1",), gated_attention),
        GatedResidual("spatial_attention", "transformer_blocks", ("attn1",), gated_attention),
    ),
    default_part="temporal_attention",
    # Otherwise tokens are rearranged from frames to places and back between blocks that do nothing.
    reuse_arguments={"enable_temporal_attentions": False},
    applies="spatial",
    spared=(Spared("caption_projection", one_token),),
    block_program=LatteBlock(),
)


def gated_attention_of_one_list(block: Any, outputs: Outputs, given: Arguments) -> Tensor:
    """gate * attention; a layer of the block returns the gate."""
    gate: Tensor = outputs["adaLN_modulation"].chunk(6, dim=1)[2]
    return gate.unsqueeze(1) * outputs["attn"]


_CHILDREN = ("adaLN_modulation", "attn")

# Latte without text: both kinds of block are in one list. Open-Sora has a class of the same name and another
# structure.
LATTE_OF_ONE_LIST = ModelSpec(
    classes=("Latte",),
    lists=(
        BlockList("blocks", "spatial", "spatial", 0, {"spatial_attention": "attn", "mlp": "mlp"}),
        BlockList("blocks", "temporal", "temporal", 1, {"temporal_attention": "attn", "mlp": "mlp"}),
    ),
    alternating=True,
    streams=("x",),
    latents="x",
    timestep="t",
    frame_axis=1,
    residuals=(
        GatedResidual("temporal_attention", "blocks[1::2]", _CHILDREN, gated_attention_of_one_list),
        GatedResidual("spatial_attention", "blocks[0::2]", _CHILDREN, gated_attention_of_one_list),
    ),
    default_part="temporal_attention",
    requires=lambda model: hasattr(model, "temp_embed"),
)

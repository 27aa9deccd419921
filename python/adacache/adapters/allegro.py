# SPDX-License-Identifier: Apache-2.0
"""Allegro (arXiv 2410.15458) and Sana-Video, which gates its blocks in the same way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from adacache.adapters.spec import Arguments, BlockList, GatedResidual, ModelSpec, Outputs
from adacache.fused.allegro import AllegroBlock
from adacache.fused.sana_video import SanaVideoBlock


def gated_attention(block: Any, outputs: Outputs, given: Arguments) -> Tensor:
    """gate * attention; the gate is in the block's table plus the timestep embedding [B, 6 * C] or
    [B, 1|N, 6 * C]."""
    time = given["temb"] if "temb" in given else given["timestep"]
    time = time.reshape(time.shape[0], -1, 6, time.shape[-1] // 6)
    return (block.scale_shift_table[2] + time[:, :, 2]) * outputs["attn1"]


ALLEGRO = ModelSpec(
    classes=("AllegroTransformer3DModel",),
    lists=(
        BlockList(
            "transformer_blocks", outputs={"attention": "attn1", "cross_attention": "attn2", "mlp": "ff"}
        ),
    ),
    shared=("image_rotary_emb",),
    residuals=(GatedResidual("attention", "transformer_blocks", ("attn1",), gated_attention),),
    block_program=AllegroBlock(),
)
SANA_VIDEO = replace(
    ALLEGRO,
    classes=("SanaVideoTransformer3DModel",),
    shared=("rotary_emb",),
    block_program=SanaVideoBlock(),
)

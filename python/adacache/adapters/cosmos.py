# SPDX-License-Identifier: Apache-2.0
"""Cosmos (arXiv 2501.03575): three gated sub-layers; each norm returns its gate."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from adacache.adapters.spec import Arguments, BlockList, GatedResidual, ModelSpec, Outputs
from adacache.fused.cosmos import CosmosBlock


def gated_attention(block: Any, outputs: Outputs, given: Arguments) -> Tensor:
    gate: Tensor = outputs["norm1"][1]
    return gate * outputs["attn1"]


COSMOS = ModelSpec(
    classes=("CosmosTransformer3DModel",),
    lists=(
        BlockList(
            "transformer_blocks", outputs={"attention": "attn1", "cross_attention": "attn2", "mlp": "ff"}
        ),
    ),
    shared=("image_rotary_emb",),
    residuals=(GatedResidual("attention", "transformer_blocks", ("norm1", "attn1"), gated_attention),),
    block_program=CosmosBlock(),
)

# SPDX-License-Identifier: Apache-2.0
"""Kandinsky 5: blocks over the video's tokens, with three gates each."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from adacache.adapters.spec import Arguments, BlockList, GatedResidual, ModelSpec, Outputs
from adacache.fused.kandinsky import KandinskyBlock


def gated_attention(block: Any, outputs: Outputs, given: Arguments) -> Tensor:
    gate = outputs["visual_modulation"].unsqueeze(1).chunk(9, dim=-1)[2]
    return gate.float() * outputs["self_attention"].float()


_CHILDREN = {"attention": "self_attention", "cross_attention": "cross_attention", "mlp": "feed_forward"}

KANDINSKY_5 = ModelSpec(
    classes=("Kandinsky5Transformer3DModel",),
    lists=(BlockList("visual_transformer_blocks", outputs=_CHILDREN),),
    streams=("visual_embed",),
    shared=("sparse_params",),
    frame_axis=1,
    residuals=(
        GatedResidual(
            "attention", "visual_transformer_blocks", ("visual_modulation", "self_attention"), gated_attention
        ),
    ),
    block_program=KandinskyBlock(),
)

# SPDX-License-Identifier: Apache-2.0
"""CogVideoX (arXiv 2408.06072), ConsisID and EasyAnimate: joint attention of video and text, both gated."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from adacache.adapters.spec import (
    Arguments,
    BlockList,
    GatedResidual,
    ModelSpec,
    Outputs,
    Spared,
    zero_tokens,
)
from adacache.fused.cogvideox import CogVideoXBlock


def gated_attention(block: Any, outputs: Outputs, given: Arguments) -> Tensor:
    """gate * attention of the video's tokens; the first norm returns the gate [B, 1, C] or [B, C]."""
    gate = outputs["norm1"][2]
    return (gate if gate.ndim == 3 else gate.unsqueeze(1)) * outputs["attn1"][0]


COGVIDEOX = ModelSpec(
    classes=("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel"),
    lists=(BlockList("transformer_blocks", outputs={"attention": "attn1", "mlp": "ff"}),),
    streams=("hidden_states", "encoder_hidden_states"),
    shared=("image_rotary_emb",),
    frame_axis=1,
    residuals=(GatedResidual("attention", "transformer_blocks", ("norm1", "attn1"), gated_attention),),
    spared=(Spared("patch_embed.text_proj", zero_tokens, stream=1),),
    block_program=CogVideoXBlock(),
)
EASYANIMATE = replace(
    COGVIDEOX,
    classes=("EasyAnimateTransformer3DModel",),
    lists=(BlockList("transformer_blocks", outputs={"attention": "attn1"}),),
    frame_axis=2,
    spared=(),
    block_program=None,
)

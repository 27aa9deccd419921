# SPDX-License-Identifier: Apache-2.0
"""Mochi 1: video and text streams; the gate, under a tanh, is inside a norm of the attention's output."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from adacache.adapters.spec import Arguments, BlockList, GatedResidual, ModelSpec, Outputs
from adacache.fused.mochi import MochiBlock


def gated_attention(block: Any, outputs: Outputs, given: Arguments) -> Tensor:
    attention: Tensor = outputs["norm2"]
    return attention


MOCHI = ModelSpec(
    classes=("MochiTransformer3DModel",),
    lists=(BlockList("transformer_blocks", outputs={"attention": "attn1", "mlp": "ff"}),),
    streams=("hidden_states", "encoder_hidden_states"),
    shared=("image_rotary_emb",),
    residuals=(GatedResidual("attention", "transformer_blocks", ("norm2",), gated_attention),),
    frames=lambda model, given: int(given["hidden_states"].shape[2]),
    block_program=MochiBlock(),
)

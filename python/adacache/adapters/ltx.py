# SPDX-License-Identifier: Apache-2.0
"""LTX-Video (arXiv 2501.00103) and LTX-2."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from adacache.adapters.spec import Arguments, BlockList, GatedResidual, ModelSpec, Outputs
from adacache.fused.ltx import LTXBlock
from adacache.fused.ltx2 import LTX2Block


def gated_attention(block: Any, outputs: Outputs, given: Arguments) -> Tensor:
    """attention * gate; the gate is in the block's table plus the timestep embedding [B, 1|N, 6 * C]."""
    table, time = block.scale_shift_table, given["temb"]
    gate = table[2].to(time.device) + time.unflatten(2, (table.shape[0], -1))[:, :, 2]
    return outputs["attn1"] * gate


LTX_VIDEO = ModelSpec(
    classes=("LTXVideoTransformer3DModel",),
    lists=(
        BlockList(
            "transformer_blocks", outputs={"attention": "attn1", "cross_attention": "attn2", "mlp": "ff"}
        ),
    ),
    residuals=(GatedResidual("attention", "transformer_blocks", ("attn1",), gated_attention),),
    frames=lambda model, given: given.get("num_frames") or 1,
    block_program=LTXBlock(),
)
# The tokens of the video and of its sound run through the blocks together; both are cached.
LTX_2 = replace(
    LTX_VIDEO,
    classes=("LTX2VideoTransformer3DModel",),
    streams=("hidden_states", "audio_hidden_states"),
    block_program=LTX2Block(),
)

# SPDX-License-Identifier: Apache-2.0
"""HunyuanVideo (arXiv 2412.03603) and HunyuanVideo-1.5: blocks with two streams, then blocks that join
them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from adacache.adapters.spec import Arguments, BlockList, GatedResidual, ModelSpec, Outputs
from adacache.fused.hunyuan_video import HunyuanVideoBlock


def gated_attention(block: Any, outputs: Outputs, given: Arguments) -> Tensor:
    """attention * gate of the video's tokens; the block's first norm returns the gate. Where the first frame
    is given, its tokens have their own gate."""
    attention, gates = outputs["attn"][0], outputs["norm1"]
    if len(gates) == 5:
        return attention * gates[1].unsqueeze(1)
    return _with_two_gates(attention, gates[5], gates[1], given["num_tokens"])


def gated_both(block: Any, outputs: Outputs, given: Arguments) -> Tensor:
    """gate * (attention and MLP in one) of the video's tokens, the only residual of a block with joined
    streams."""
    count = given["hidden_states"].shape[1]
    residual, gates = outputs["proj_out"][:, :count], outputs["norm"]
    if len(gates) == 2:
        return gates[1].unsqueeze(1) * residual
    return _with_two_gates(residual, gates[2], gates[1], given["num_tokens"])


def _with_two_gates(y: Tensor, first: Tensor, rest: Tensor, count: int) -> Tensor:
    return torch.cat((y[:, :count] * first.unsqueeze(1), y[:, count:] * rest.unsqueeze(1)), dim=1)


_TWO_STREAMS = BlockList("transformer_blocks", outputs={"attention": "attn", "mlp": "ff"})
_JOINED = BlockList("single_transformer_blocks", outputs={"attention": "attn"})

HUNYUAN_VIDEO_15 = ModelSpec(
    classes=("HunyuanVideo15Transformer3DModel",),
    lists=(_TWO_STREAMS,),
    streams=("hidden_states", "encoder_hidden_states"),
    shared=("freqs_cis", "image_rotary_emb"),
    residuals=(GatedResidual("attention", "transformer_blocks", ("norm1", "attn"), gated_attention),),
    block_program=HunyuanVideoBlock(),
)
HUNYUAN_VIDEO = replace(
    HUNYUAN_VIDEO_15,
    classes=("HunyuanVideoTransformer3DModel",),
    lists=(_TWO_STREAMS, _JOINED),
    residuals=(
        *HUNYUAN_VIDEO_15.residuals,
        GatedResidual("attention", "single_transformer_blocks", ("norm", "proj_out"), gated_both),
    ),
)
# HunyuanVideo over the tokens of earlier frames, which have several sizes, and of generated ones.
FRAMEPACK = replace(
    HUNYUAN_VIDEO,
    classes=("HunyuanVideoFramepackTransformer3DModel",),
    frames=lambda model, given: 1,
)

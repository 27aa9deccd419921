# SPDX-License-Identifier: Apache-2.0
"""Vchitect 2.0 of `videosys`: the batch of its blocks holds the frames. The model takes one video per
call."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from adacache.adapters.spec import Arguments, BlockList, GatedResidual, ModelSpec, Outputs


def gated_attention(block: Any, outputs: Outputs, given: Arguments) -> Tensor:
    gate: Tensor = outputs["norm1"][1]
    return gate.unsqueeze(1) * outputs["attn"][0]


VCHITECT = ModelSpec(
    classes=("VchitectXLTransformerModel",),
    lists=(BlockList("transformer_blocks", layout="spatial", outputs={"attention": "attn", "mlp": "ff"}),),
    streams=("hidden_states", "encoder_hidden_states"),
    reversed_streams=True,
    shared=("freqs_cis",),
    frame_axis=1,
    residuals=(GatedResidual("attention", "transformer_blocks", ("norm1", "attn"), gated_attention),),
)

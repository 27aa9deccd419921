"""HunyuanVideo (arXiv 2412.03603) and HunyuanVideo-1.5: blocks of two streams, then blocks that join them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adacache.adapters.blocks import Arguments, BlockAdapter, BlockList, Seen, Watched


def gated_attention(block: Any, seen: Seen, given: Arguments) -> Tensor:
    """attention * gate of the video's tokens; the block's first norm returns the gate. Where the first frame
    is given, its tokens have a gate of their own."""
    attention, gates = seen["attn"][0], seen["norm1"]
    if len(gates) == 5:
        return attention * gates[1].unsqueeze(1)
    return _of_two_gates(attention, gates[5], gates[1], given["num_tokens"])


def gated_both(block: Any, seen: Seen, given: Arguments) -> Tensor:
    """gate * (attention and MLP in one) of the video's tokens, the only residual of a joined block."""
    count = given["hidden_states"].shape[1]
    residual, gates = seen["proj_out"][:, :count], seen["norm"]
    if len(gates) == 2:
        return gates[1].unsqueeze(1) * residual
    return _of_two_gates(residual, gates[2], gates[1], given["num_tokens"])


def _of_two_gates(y: Tensor, first: Tensor, rest: Tensor, count: int) -> Tensor:
    return torch.cat((y[:, :count] * first.unsqueeze(1), y[:, count:] * rest.unsqueeze(1)), dim=1)


class HunyuanVideo15Adapter(BlockAdapter):
    classes = ("HunyuanVideo15Transformer3DModel",)
    streams = ("hidden_states", "encoder_hidden_states")
    shared = ("freqs_cis", "image_rotary_emb")
    parts: tuple[Watched, ...] = (
        Watched("attention", "transformer_blocks", ("norm1", "attn"), gated_attention),
    )


class HunyuanVideoAdapter(HunyuanVideo15Adapter):
    classes = ("HunyuanVideoTransformer3DModel",)
    lists = (BlockList("transformer_blocks"), BlockList("single_transformer_blocks"))
    parts = (
        *HunyuanVideo15Adapter.parts,
        Watched("attention", "single_transformer_blocks", ("norm", "proj_out"), gated_both),
    )


class FramepackAdapter(HunyuanVideoAdapter):
    """FramePack: HunyuanVideo over the tokens of earlier frames and those that are made."""

    classes = ("HunyuanVideoFramepackTransformer3DModel",)

    def frames(self, model: Any, given: Arguments) -> int:
        return 1  # tokens of earlier frames are of several sizes

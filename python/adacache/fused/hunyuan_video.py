# SPDX-License-Identifier: Apache-2.0
"""The blocks of HunyuanVideo in diffusers: two streams that attend to each other, or both in one MLP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adacache.fused.forwards import UNKNOWN_NORMS, forward_of, runs
from adacache.fused.norms import ModelNorm
from adacache.fused.program import Add

NORM_FORWARDS = frozenset({"406af33b4989425a", "8f9a49e59c1f3478"})
"""AdaLayerNormZero and AdaLayerNormZeroSingle of diffusers 0.42.1."""
FIRST_FRAME_NORM_FORWARDS = frozenset({"ccb0431859267f7a", "5c123ec44f067164"})
"""Those of HunyuanVideoTokenReplace: the first frame is given, and has its own modulators."""


class HunyuanVideoBlock:
    """See `BlockProgram`."""

    parts: tuple[str, ...] = ("attention", "mlp")
    forwards = frozenset(
        {
            "0104d2b7d3591691",  # two streams: HunyuanVideo, Framepack and 1.5 of diffusers 0.42.1
            "0ccffe2ee9e609f9",  # both in one: HunyuanVideo and Framepack
            "c92be79f1f22abc4",  # two streams, with a given first frame
            "44dd5185cd31b146",  # both in one, with a given first frame
        }
    )

    def refuses(self, block: Any) -> str | None:
        known = NORM_FORWARDS | FIRST_FRAME_NORM_FORWARDS
        for norm in (block.norm,) if _is_joined(block) else (block.norm1, block.norm1_context):
            if getattr(norm, "emb", None) is not None or not runs(norm, known):
                return UNKNOWN_NORMS
        return None

    def takes(self, block: Any, given: Mapping[str, Any]) -> bool:
        x = given["hidden_states"]
        streams, times = [x, given.get("encoder_hidden_states")], [given.get("temb")]
        if _has_first_frame(block.norm if _is_joined(block) else block.norm1):
            times.append(given.get("token_replace_emb"))
            count = given.get("num_tokens")
            if not isinstance(count, int) or count < 1 or x.shape[1] % count:
                return False
        return all(isinstance(one, Tensor) and one.ndim == 3 and one.shape[1] for one in streams) and all(
            isinstance(time, Tensor) and time.ndim == 2 for time in times
        )

    def run(self, block: Any, given: Mapping[str, Any], add: Add) -> tuple[Tensor, Tensor]:
        return _run_joined(block, given, add) if _is_joined(block) else _run_two(block, given, add)


def _is_joined(block: Any) -> bool:
    return hasattr(block, "proj_mlp")


def _run_two(block: Any, given: Mapping[str, Any], add: Add) -> tuple[Tensor, Tensor]:
    text, time = given["encoder_hidden_states"], given["temb"]
    x = given["hidden_states"].contiguous()  # at the first block a transposed view of the embedding
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = _of_frames(block.norm1, given, 6)
    norm, norm_mlp = ModelNorm(block.norm1.norm, shift, scale), ModelNorm(block.norm2, shift_mlp, scale_mlp)
    shift, scale, text_gate, shift_mlp, scale_mlp, text_gate_mlp = _modulation(block.norm1_context, time, 6)
    text_norm = ModelNorm(block.norm1_context.norm, shift, scale)
    text_norm_mlp = ModelNorm(block.norm2_context, shift_mlp, scale_mlp)
    y, text_y = block.attn(
        hidden_states=add.norm(x, norm),
        encoder_hidden_states=add.norm(text, text_norm),
        attention_mask=given.get("attention_mask"),
        image_rotary_emb=given.get("freqs_cis"),
    )
    x, normed = add("attention", x, y, gate, norm_mlp)
    text, text_normed = add("text_attention", text, text_y, text_gate, text_norm_mlp)
    y, text_y = block.ff(normed), block.ff_context(text_normed)
    x, _ = add("mlp", x, y, gate_mlp)
    text, _ = add("text_mlp", text, text_y, text_gate_mlp)
    return x, text


def _run_joined(block: Any, given: Mapping[str, Any], add: Add) -> tuple[Tensor, Tensor]:
    x, text = given["hidden_states"].contiguous(), given["encoder_hidden_states"]
    count = x.shape[1]
    shift, scale, gate = _of_frames(block.norm, given, 3)
    norm = ModelNorm(block.norm.norm, shift, scale)
    shift, scale, text_gate = _modulation(block.norm, given["temb"], 3)
    text_norm = ModelNorm(block.norm.norm, shift, scale)
    joint = x.new_empty(x.shape[0], count + text.shape[1], x.shape[2])
    add.norm(x, norm, joint[:, :count])
    add.norm(text, text_norm, joint[:, count:])
    hidden = block.act_mlp(block.proj_mlp(joint))
    attention = block.attn(
        hidden_states=joint[:, :count],
        encoder_hidden_states=joint[:, count:],
        attention_mask=given.get("attention_mask"),
        image_rotary_emb=given.get("image_rotary_emb"),
    )
    y = block.proj_out(torch.cat([torch.cat(attention, dim=1), hidden], dim=2))
    x, _ = add("attention", x, y[:, :count], gate)
    text, _ = add("text_attention", text, y[:, count:], text_gate)
    return x, text


def _of_frames(module: Any, given: Mapping[str, Any], parts: int) -> Sequence[Tensor]:
    """`_modulation` of the video's tokens, each [B, 1|T, C]."""
    rest = _modulation(module, given["temb"], parts)
    if not _has_first_frame(module):
        return rest
    first = _modulation(module, given["token_replace_emb"], parts)
    others = given["hidden_states"].shape[1] // given["num_tokens"] - 1
    return [torch.cat((one, two.expand(-1, others, -1)), dim=1) for one, two in zip(first, rest, strict=True)]


def _modulation(module: Any, time: Tensor, parts: int) -> Sequence[Tensor]:
    """What an adaptive norm makes of a timestep embedding, each [B, 1, C]."""
    values: Tensor = module.linear(module.silu(time))
    return values.unsqueeze(1).chunk(parts, dim=2)


def _has_first_frame(norm: Any) -> bool:
    return forward_of(norm) in FIRST_FRAME_NORM_FORWARDS

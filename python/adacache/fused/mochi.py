# SPDX-License-Identifier: Apache-2.0
"""The block of Mochi in diffusers: video and text, each with RMS norms before and after attention and MLP.
The gate is under a tanh and scales the norm of a sub-layer's output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adacache.fused.forwards import UNKNOWN_NORMS, runs
from adacache.fused.norms import ModelNorm
from adacache.fused.program import Add

ZERO_NORM_FORWARDS = frozenset({"891ee1579f7f25f5"})  # MochiRMSNormZero of diffusers 0.42.1
NORM_FORWARDS = frozenset({"ea940e651ceccc5e"})  # MochiModulatedRMSNorm


class MochiBlock:
    """See `BlockProgram`."""

    parts: tuple[str, ...] = ("attention", "mlp")
    forwards = frozenset({"557793c711a7fd55"})  # diffusers 0.42.1

    def refuses(self, block: Any) -> str | None:
        ends = ("",) if block.context_pre_only else ("", "_context")
        known = all(
            runs(getattr(block, f"norm1{end}"), ZERO_NORM_FORWARDS)
            and all(runs(getattr(block, f"norm{number}{end}"), NORM_FORWARDS) for number in (2, 3, 4))
            for end in ends
        )
        return None if known else UNKNOWN_NORMS

    def takes(self, block: Any, given: Mapping[str, Any]) -> bool:
        time = given.get("temb")
        streams = [given["hidden_states"], given.get("encoder_hidden_states")]
        return (
            isinstance(time, Tensor)
            and time.ndim == 2
            # The sum of an RMS norm over channels with another stride has another order.
            and all(isinstance(one, Tensor) and one.ndim == 3 and one.stride(2) == 1 for one in streams)
        )

    def run(self, block: Any, given: Mapping[str, Any], add: Add) -> tuple[Tensor, Tensor]:
        x, text, time = (given[name] for name in ("hidden_states", "encoder_hidden_states", "temb"))
        norms = _norms(block, "", time)
        if block.context_pre_only:
            text_normed = block.norm1_context(text, time)
        else:
            text_norms = _norms(block, "_context", time)
            text_normed = add.norm(text, text_norms[0])
        y, text_y = block.attn1(
            hidden_states=add.norm(x, norms[0]),
            encoder_hidden_states=text_normed,
            image_rotary_emb=given.get("image_rotary_emb"),
            attention_mask=given["encoder_attention_mask"],
        )
        x = _rest(block.ff, "", x, y, norms, add)
        if not block.context_pre_only:
            text = _rest(block.ff_context, "text_", text, text_y, text_norms, add)
        return x, text


def _rest(ff: Any, stream: str, x: Tensor, y: Tensor, norms: tuple[ModelNorm, ...], add: Add) -> Tensor:
    """A stream after the block, from the output y of the attention."""
    _, after_attention, before_mlp, after_mlp = norms
    x, normed = add(f"{stream}attention", x, add.norm(y, after_attention), None, before_mlp)
    return add(f"{stream}mlp", x, add.norm(ff(normed), after_mlp), None)[0]


def _norms(block: Any, end: str, time: Tensor) -> tuple[ModelNorm, ...]:
    """The four norms of one stream, whose names have this end."""
    first = getattr(block, f"norm1{end}")
    parts = first.linear(first.silu(time)).unsqueeze(1).chunk(4, dim=2)
    scale, gate, scale_mlp, gate_mlp = parts
    after_attention, before_mlp, after_mlp = (
        getattr(block, f"norm{number}{end}").norm for number in (2, 3, 4)
    )
    return (
        ModelNorm(first.norm, scale=scale.float(), float32=True),
        ModelNorm(after_attention, gain=torch.tanh(gate), float32=True),
        ModelNorm(before_mlp, scale=scale_mlp.float(), float32=True),
        ModelNorm(after_mlp, gain=torch.tanh(gate_mlp), float32=True),
    )

# SPDX-License-Identifier: Apache-2.0
"""Vchitect 2.0 as in videosys: frames are in the batch dimension of the blocks, the first block repeats
captions per frame, blocks return captions first, and the last block returns no captions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from twins.parts import Attention, Patches, TimeEmbedding, mlp, norm


class Norm(nn.Module):
    """A norm that also returns the other four modulations of the block."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear, self.norm = nn.Linear(dim, 6 * dim), norm(dim)

    def forward(self, x: Tensor, emb: Tensor) -> tuple[Tensor, ...]:
        shift, scale, *others = self.linear(emb).chunk(6, dim=1)
        return (self.norm(x) * (1 + scale[:, None]) + shift[:, None], *others)


class JointAttention(Attention):
    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Any:  # type: ignore[override]
        places = hidden_states.shape[1]
        both = super().forward(torch.cat((hidden_states, encoder_hidden_states), dim=1))
        video = both[:, :places] + both[:, :places].mean(dim=0, keepdim=True)  # of all frames
        return video, both[:, places:]


class JointTransformerBlock(nn.Module):
    def __init__(self, dim: int, last: bool):
        super().__init__()
        self.norm1, self.norm1_context, self.attn = Norm(dim), Norm(dim), JointAttention(dim)
        self.norm2, self.ff, self.last = norm(dim), mlp(dim), last

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        freqs_cis: Tensor,
        full_seqlen: int,
        Frame: int,
        timestep: Tensor,
    ) -> tuple[Tensor | None, Tensor]:
        x, gate, shift_mlp, scale_mlp, gate_mlp = self.norm1(hidden_states, emb=temb)
        captions, caption_gate, *_ = self.norm1_context(encoder_hidden_states, emb=temb)
        y, caption_y = self.attn(hidden_states=x, encoder_hidden_states=captions)
        hidden_states = hidden_states + gate[:, None] * y
        y = self.ff(self.norm2(hidden_states) * (1 + scale_mlp[:, None]) + shift_mlp[:, None])
        hidden_states = hidden_states + gate_mlp[:, None] * y
        return None if self.last else encoder_hidden_states + caption_gate[:, None] * caption_y, hidden_states


class VchitectXLTransformerModel(nn.Module):
    def __init__(self, dim: int = 16, depth: int = 4):
        super().__init__()
        self.pos_embed, self.time_text_embed = Patches(dim), TimeEmbedding(dim)
        self.context_embedder = nn.Linear(12, dim)
        self.transformer_blocks = nn.ModuleList(
            JointTransformerBlock(dim, last=i == depth - 1) for i in range(depth)
        )

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        batch, frames, _, height, width = hidden_states.shape
        x = self.pos_embed(hidden_states.transpose(1, 2)).flatten(0, 1)
        temb = self.time_text_embed(timestep)[1].repeat(frames, 1)
        captions = self.context_embedder(encoder_hidden_states)
        for block in self.transformer_blocks:
            captions, x = block(
                hidden_states=x,
                encoder_hidden_states=captions,
                temb=temb,
                freqs_cis=torch.ones(8, 4),
                full_seqlen=batch * frames,
                Frame=frames,
                timestep=timestep,
            )
        output = self.pos_embed.unpatchify(x.unflatten(0, (batch, frames)), height // 2, width // 2)
        output = output.transpose(1, 2).flatten(0, 1)
        return {"sample": output} if return_dict else (output,)

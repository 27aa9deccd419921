# SPDX-License-Identifier: Apache-2.0
"""Open-Sora-Plan 1.2 (OpenSoraT2V: the block of Latte over all tokens) and 1.3 (OpenSoraT2V_v1_3: blocks have
the layout [N, B, C], and some attend within groups of tokens, with masks [groups * B, ...])."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from twins.latte import BasicTransformerBlock
from twins.parts import Attention, Patches, TimeEmbedding, mlp, norm


class OpenSoraT2V(nn.Module):
    def __init__(self, dim: int = 16, depth: int = 4):
        super().__init__()
        self.pos_embed, self.adaln_single = Patches(dim), TimeEmbedding(dim)
        self.caption_projection = nn.Linear(12, dim)
        self.transformer_blocks = nn.ModuleList(self.block(dim, i) for i in range(depth))

    def block(self, dim: int, _number: int) -> nn.Module:
        return BasicTransformerBlock(dim, cross=True)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        use_image_num: int = 0,
        return_dict: bool = True,
    ) -> Any:
        _, _, frames, height, width = hidden_states.shape
        x = self.pos_embed(hidden_states)
        time, _embedded = self.adaln_single(timestep)
        captions = self.caption_projection(encoder_hidden_states)
        size = {"frame": frames, "height": height // 2, "width": width // 2}
        x = self.run(x.flatten(1, 2), captions, time, attention_mask, **size)
        output = self.pos_embed.unpatchify(x.unflatten(1, (frames, -1)), height // 2, width // 2)
        return {"sample": output} if return_dict else (output,)

    def run(self, x: Tensor, captions: Tensor, time: Tensor, mask: Tensor | None, **size: int) -> Tensor:
        for block in self.transformer_blocks:
            x = block(
                x,
                attention_mask=self.bias(block, mask),
                encoder_hidden_states=captions,
                encoder_attention_mask=None,
                timestep=time,
                **size,
            )
        return x

    def bias(self, block: Any, mask: Tensor | None) -> Tensor | None:
        return None if mask is None else (mask[:, None, None] - 1) * 10000.0


class TokensFirstBlock(nn.Module):
    def __init__(self, dim: int, groups: int):
        super().__init__()
        self.groups = groups
        self.norm1, self.attn1, self.attn2 = norm(dim), TokensFirst(dim, groups), TokensFirst(dim)
        self.norm2, self.ff = norm(dim), mlp(dim)
        self.scale_shift_table = nn.Parameter(torch.zeros(6, dim))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        frame: int | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> Tensor:
        assert timestep is not None
        values = self.scale_shift_table[:, None] + timestep.reshape(6, hidden_states.shape[1], -1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = values.chunk(6, dim=0)
        x = self.norm1(hidden_states) * (1 + scale_msa) + shift_msa
        y = self.attn1(x, encoder_hidden_states=None, attention_mask=attention_mask)
        hidden_states = gate_msa * y + hidden_states
        hidden_states = self.attn2(hidden_states, encoder_hidden_states=encoder_hidden_states) + hidden_states
        y = self.ff(self.norm2(hidden_states) * (1 + scale_mlp) + shift_mlp)
        return gate_mlp * y + hidden_states


class TokensFirst(Attention):
    def __init__(self, dim: int, groups: int = 1):
        super().__init__(dim)
        self.groups = groups

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        captions = None if encoder_hidden_states is None else encoder_hidden_states.transpose(0, 1)
        x = hidden_states.unflatten(0, (-1, self.groups)).flatten(1, 2).transpose(0, 1)
        y = super().forward(x, captions, attention_mask).transpose(0, 1)
        return y.unflatten(1, (self.groups, -1)).flatten(0, 1)


class OpenSoraT2V_v1_3(OpenSoraT2V):
    def block(self, dim: int, number: int) -> nn.Module:
        return TokensFirstBlock(dim, groups=1 if number < 2 else 2)

    def bias(self, block: Any, mask: Tensor | None) -> Tensor | None:
        if mask is None:
            return None
        by_group = mask.unflatten(1, (-1, block.groups)).permute(2, 0, 1).flatten(0, 1)
        return super().bias(block, by_group)

    def run(self, x: Tensor, captions: Tensor, time: Tensor, mask: Tensor | None, **size: int) -> Tensor:
        # The block takes the modulation as [6, B, C].
        time = time.unflatten(1, (6, -1)).transpose(0, 1).contiguous()
        x, captions = (value.transpose(0, 1).contiguous() for value in (x, captions))
        return super().run(x, captions, time, mask, **size).transpose(0, 1).contiguous()

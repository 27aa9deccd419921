# SPDX-License-Identifier: Apache-2.0
"""LatteT2V of the Latte repository, Open-Sora-Plan 1.1 and videosys, and Latte without text. Spatial blocks
have the layout [B*T, S, C], temporal blocks [B*S, T, C]; the model rearranges tokens between them, and adds a
temporal embedding after the first spatial block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from twins.parts import Attention, Patches, TimeEmbedding, mlp, norm


class BasicTransformerBlock(nn.Module):
    def __init__(self, dim: int, cross: bool):
        super().__init__()
        self.norm1, self.attn1 = norm(dim), Attention(dim)
        self.attn2 = Attention(dim) if cross else None
        if cross:
            self.norm2 = norm(dim)
        else:
            self.norm3 = norm(dim)
        self.ff = mlp(dim)
        self.scale_shift_table = nn.Parameter(torch.zeros(6, dim))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: Any = None,
        class_labels: Any = None,
        frame: int | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> Tensor:
        assert timestep is not None
        values = self.scale_shift_table[None] + timestep.reshape(hidden_states.shape[0], 6, -1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = values.chunk(6, dim=1)
        y = self.attn1(self.norm1(hidden_states) * (1 + scale_msa) + shift_msa, attention_mask=attention_mask)
        hidden_states = gate_msa * y + hidden_states
        if self.attn2 is not None:
            hidden_states = self.attn2(hidden_states, encoder_hidden_states) + hidden_states
        normed = self.norm3(hidden_states) if self.attn2 is None else self.norm2(hidden_states)
        y = self.ff(normed * (1 + scale_mlp) + shift_mlp)
        return gate_mlp * y + hidden_states


class LatteT2V(nn.Module):
    def __init__(self, dim: int = 16, depth: int = 4):
        super().__init__()
        self.pos_embed, self.adaln_single = Patches(dim), TimeEmbedding(dim)
        self.caption_projection = nn.Linear(12, dim)
        self.transformer_blocks = nn.ModuleList(BasicTransformerBlock(dim, cross=True) for _ in range(depth))
        self.temporal_transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(dim, cross=False) for _ in range(depth)
        )
        self.register_buffer("temp_pos_embed", torch.linspace(-1, 1, 3 * dim).reshape(1, 3, dim))

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        use_image_num: int = 0,
        enable_temporal_attentions: bool = True,
        return_dict: bool = True,
    ) -> Any:
        batch, _, frames, height, width = hidden_states.shape
        x = self.pos_embed(hidden_states)
        places = x.shape[2]
        time, _embedded = self.adaln_single(timestep)
        captions = self.caption_projection(encoder_hidden_states).repeat_interleave(frames, dim=0)
        time_of_frames, time_of_places = (time.repeat_interleave(n, dim=0) for n in (frames, places))
        x = x.flatten(0, 1)
        for i, (spatial, temporal) in enumerate(
            zip(self.transformer_blocks, self.temporal_transformer_blocks, strict=True)
        ):
            x = spatial(x, attention_mask, captions, encoder_attention_mask, time_of_frames, None, None)
            if enable_temporal_attentions:
                x = x.unflatten(0, (batch, frames)).transpose(1, 2).flatten(0, 1).contiguous()
                if i == 0:
                    x = x + self.temp_pos_embed
                x = temporal(x, None, None, None, time_of_places, None, None)
                x = x.unflatten(0, (batch, places)).transpose(1, 2).flatten(0, 1).contiguous()
        output = self.pos_embed.unpatchify(x.unflatten(0, (batch, frames)), height // 2, width // 2)
        return {"sample": output} if return_dict else (output,)


class TransformerBlock(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.norm1, self.attn = norm(dim), Attention(dim)
        self.norm2, self.mlp = norm(dim), mlp(dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = (
            value.unsqueeze(1) for value in self.adaLN_modulation(c).chunk(6, dim=1)
        )
        x = x + gate_msa * self.attn(self.norm1(x) * (1 + scale_msa) + shift_msa)
        return x + gate_mlp * self.mlp(self.norm2(x) * (1 + scale_mlp) + shift_mlp)


class Latte(nn.Module):
    """Without text: one list has spatial and temporal blocks, and samplers call `forward_with_cfg`."""

    def __init__(self, dim: int = 16, depth: int = 8, frames: int = 3):
        super().__init__()
        self.x_embedder, self.t_embedder = Patches(dim), TimeEmbedding(dim)
        self.y_embedder = nn.Embedding(11, dim)
        self.temp_embed = nn.Parameter(torch.zeros(1, frames, dim))
        self.blocks = nn.ModuleList(TransformerBlock(dim) for _ in range(depth))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        batch, frames, _, height, width = x.shape
        x = self.x_embedder(x.transpose(1, 2))
        places = x.shape[2]
        c = self.t_embedder(t)[1] + self.y_embedder(y)
        x = x.flatten(0, 1)
        for i in range(0, len(self.blocks), 2):
            spatial, temporal = self.blocks[i : i + 2]
            x = spatial(x, c.repeat_interleave(frames, dim=0))
            x = x.unflatten(0, (batch, frames)).transpose(1, 2).flatten(0, 1)
            if i == 0:
                x = x + self.temp_embed
            x = temporal(x, c.repeat_interleave(places, dim=0))
            x = x.unflatten(0, (batch, places)).transpose(1, 2).flatten(0, 1)
        return self.x_embedder.unpatchify(x.unflatten(0, (batch, frames)), height // 2, width // 2).transpose(
            1, 2
        )

    def forward_with_cfg(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, cfg_scale: float = 7.0
    ) -> Tensor:
        half = x[: len(x) // 2]
        conditional, unconditional = self.forward(torch.cat((half, half)), t, y).chunk(2)
        guided = unconditional + cfg_scale * (conditional - unconditional)
        return torch.cat((guided, guided))
